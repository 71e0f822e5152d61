"""A command for which several processes were started, by `accelerate launch` or torchrun, and which they share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .work import UsageError


@dataclass(frozen=True)
class Share:
    """What of a command's work this process does.

    Attributes:
        rank, size: the number of this process, and how many there are.
        device: where its model runs.
    """

    rank: int
    size: int
    device: str

    def of(self, batches: Iterable[Any]) -> Iterable[Any]:
        """This process's share of the batches."""
        return batches if self.size == 1 else itertools.islice(batches, self.rank, None, self.size)


def started() -> int:
    """How many processes were started for this command."""
    said = os.environ.get("WORLD_SIZE", "1")
    return int(said) if said.isdigit() else 1


def first() -> bool:
    """Whether this process is the first of those that were started: what all have to say, it says."""
    return os.environ.get("RANK", "0") == "0"


def check_alone(what: str) -> None:
    """UsageError where several processes were started for what one has to do."""
    if started() > 1:
        raise UsageError(
            f"{started()} processes were started, and each would do all of it: relu-ize with --calibration and without "
            f"--stream can be shared, {what} cannot. Run the command itself, without accelerate launch or torchrun"
        )


@contextmanager
def shared(device: str) -> Iterator[Share]:
    """Within the block, the processes that were started can work together.

    Raises:
        UsageError: several, on a device that is neither cpu nor cuda: each takes its own.
    """
    if started() == 1:
        yield Share(0, 1, device)
        return
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: {started()} processes were started: expected cpu, or cuda for one device each")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    try:
        yield Share(state.process_index, state.num_processes, str(state.device))
    finally:
        state.destroy_process_group()
