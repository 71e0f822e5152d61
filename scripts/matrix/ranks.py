"""Processes of a group on this machine: forked from one that has imported everything, with torchrun's environment."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT_SECONDS = 240


class RankError(RuntimeError):
    """A process raised: the message is its traceback."""


def on_ranks(count: int, function: Callable[[int], Any], limit: float = LIMIT_SECONDS) -> list[Any]:
    """What `function(rank)` returns in each of `count` processes, by rank; with one, outside of any group.

    To be called from a process that has run neither a backward pass nor threads.

    Raises:
        RankError: what a process raised, or that none has ended within `limit` seconds.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = multiprocessing.get_context("fork")
        started = [context.Process(target=_run, args=(rank, count, port, function, folder)) for rank in range(count)]
        for process in started:
            process.start()
        end = time.monotonic() + limit
        try:
            while any(process.is_alive() for process in started) and time.monotonic() < end:
                if any(process.exitcode for process in started):
                    break
                time.sleep(0.02)
            found = [_found(rank, Path(folder)) for rank in range(count)]
        finally:
            for process in started:
                process.kill()
                process.join()
    return found


def _found(rank: int, folder: Path) -> Any:
    """What that process wrote down."""
    failed = sorted(folder.glob("*.error"))
    if failed:
        raise RankError(failed[0].read_text())
    file = folder / f"{rank}.pickle"
    if not file.exists():
        raise RankError(f"process {rank} ended, or did not end in time, without a result")
    return pickle.loads(file.read_bytes())


def _run(rank: int, count: int, port: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # not ACCELERATE_USE_CPU, by which DeepSpeed is dropped
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    try:
        result = function(rank)
        partial = Path(folder, f"{rank}.partial")
        partial.write_bytes(pickle.dumps(result))
        partial.rename(Path(folder, f"{rank}.pickle"))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # the others may wait for it: it leaves their group by ending
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
