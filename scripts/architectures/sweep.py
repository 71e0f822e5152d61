"""Something that is done to every architecture that converts, each in a process of its own: one row of a table each."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from hf_lambda_gelu.checkpoints import stock_process
from scripts.architectures.run import RESULTS as COVERAGE
from scripts.architectures.run import append
from scripts.tools.tables import read
from scripts.tools.warm_stock import run_in_stock

LIMIT_SECONDS, LIMIT_BYTES = 240, 12 * 2**30

# (row, model type, Auto class, folder): fills in the row, "verdict" among it
Work = Callable[[dict[str, Any], str, str, Path], None]


def sweep(work: Work, results: Path, fields: Sequence[str], models: Collection[str] | None, good: Collection[str]) -> None:
    """What the results lack, of each row of coverage.csv that is exact; an interrupted run goes on where it stopped.

    Args:
        models: model types to do again, and print; None for what is missing.
        good: verdicts that are not printed.
    """
    exact = [(row["model_type"], row["auto"]) for row in read(COVERAGE) if row["verdict"] == "exact"]
    if models:
        jobs = [job for job in exact if job[0] in models]
    else:
        done = {(row["model_type"], row["auto"]) for row in read(results)}
        jobs = [job for job in exact if job not in done]
        jobs = [job for start in range(16) for job in jobs[start::16]]  # so that some of each kind come early
    run_in_stock("", [], os.getcwd(), os.environ)  # here, so that all children have the one that starts now
    stock_process.run_apart = run_in_stock
    with tqdm(total=len(jobs), disable=None) as bar:
        for job in jobs:
            row = _in_its_own_process(work, fields, *job)
            append(results, row, list(fields))
            bar.update()
            bar.set_postfix_str(job[0])
            if models or row["verdict"] not in good:
                tqdm.write(str({key: value for key, value in row.items() if value != ""}))
    print(dict(Counter(row["verdict"] for row in read(results))))


def _in_its_own_process(work: Work, fields: Sequence[str], model_type: str, auto: str) -> dict[str, str]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(work, model_type, auto, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(LIMIT_SECONDS) else {"verdict": "crash", "reason": f"over {LIMIT_SECONDS} s"}
    except EOFError:
        process.join()
        found = {"verdict": "crash", "reason": f"ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    row = {"model_type": model_type, "auto": auto, "transformers": transformers.__version__, **found}
    return {field: " ".join(str(row.get(field, "")).split())[:400] for field in fields}


def _child(work: Work, model_type: str, auto: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # drawing takes longer than all else
    row: dict[str, Any] = {}
    place = ""
    try:
        with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
            place = f"{scratch}/"  # which a table does not name
            work(row, model_type, auto, Path(scratch, "relu"))
    except Exception as error:
        row |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}".replace(place, "")}
    pipe.send(row)
