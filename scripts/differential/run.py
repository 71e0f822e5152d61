"""The refit of every architecture against a slow reference, under the conditions in which users run it.

    python -m scripts.differential.run                          # what is not in the CSV yet
    python -m scripts.differential.run --models bert llama      # these, and print them
    python -m scripts.differential.run --conditions padded      # of all models
    python -m scripts.differential.run --sample 6 --seed 1      # so many of what there is, drawn at random, into no file
    python -m scripts.differential.run --table                  # the summary

Models are tiny, with random weights (scripts/architectures); each is worked on in a process of its own, with a limit of time
and memory. An interrupted run goes on where it stopped. The exit code is 1 where a row is WRONG.
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import transformers.trainer
from tqdm.auto import tqdm

from scripts.architectures.run import MOST_USED
from scripts.architectures.tiny_models import model_types
from scripts.tools.tables import read

RESULTS = Path(__file__).parent / "results" / "differential.csv"
FIELDS = [
    "model_type",
    "condition",
    "verdict",
    "distance",
    "sites",
    "methods",
    "rows",
    "padding",
    "untold",
    "change",
    "reason",
    "seconds",
    "transformers",
]
# the 40 that run under all conditions
USED = [
    *MOST_USED,
    *("camembert", "deberta", "xlnet", "longformer", "layoutlm", "roformer", "mistral", "qwen3", "gemma2", "gemma3_text"),
    *("phi3", "mixtral", "qwen3_moe", "mbart", "hubert", "siglip", "beit", "segformer"),
]
CONDITIONS = ("padded", "labels", "packed", "autocast", "wrapped", "cached", "chunked", "compiled", "offloaded")
LIMIT_SECONDS, LIMIT_BYTES = 180, 12 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.differential.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="TYPE", help="model types; by default all")
    parser.add_argument(
        "--conditions", nargs="+", choices=CONDITIONS, help="by default all for the most used, one for the others"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--sample", type=int, metavar="N", help="so many of the jobs, drawn at random; printed, kept nowhere"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the summary of the results and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.results)))
        return
    jobs = work(options.models, options.conditions)
    results: Path | None = options.results
    if options.sample:
        jobs, results = random.Random(options.seed).sample(jobs, options.sample), None
    elif not options.models:
        done = {(row["model_type"], row["condition"]) for row in read(options.results)}
        jobs += [job for row in read(options.results) if (job := _follow_up(row)) is not None]
        jobs = [job for job in jobs if job not in done]
    rows = run_all(jobs, options.jobs, results, verbose=bool(options.models or options.sample))
    if any(row["verdict"] == "WRONG" for row in rows):
        sys.exit(1)


def work(types: list[str] | None, conditions: list[str] | None) -> list[tuple[str, str]]:
    """(model type, condition) to go through: all conditions of the most used, one of the others."""
    if types or conditions:
        return [(name, condition) for name in types or model_types() for condition in conditions or CONDITIONS]
    used = [(name, condition) for name in USED for condition in CONDITIONS]
    return used + [(name, "padded") for name in model_types() if name not in USED]


def _follow_up(row: Mapping[str, str]) -> tuple[str, str] | None:
    """Of a model without a text to pad, among those that run under one condition: another condition."""
    lacks = row["model_type"] not in USED and row["condition"] == "padded" and row["verdict"] == "makes no sense"
    return (row["model_type"], "autocast") if lacks else None


def run_all(jobs: list[tuple[str, str]], workers: int, results: Path | None, verbose: bool) -> list[dict[str, str]]:
    """Each in a child of this process, which itself never runs a model: forked processes start at once."""
    made, queue, running = [], list(reversed(jobs)), {}
    with tqdm(total=len(jobs), disable=None) as bar:
        while queue or running:
            while queue and len(running) < workers:
                job = queue.pop()
                running[job] = _start(*job)
            for job in [job for job, child in running.items() if child.ended(running)]:
                row = running.pop(job).row(*job)
                made.append(row)
                if results is not None and not verbose and (more := _follow_up(row)) is not None:
                    queue.insert(0, more)
                    bar.total += 1
                if results is not None:
                    append(results, row)
                bar.update()
                bar.set_postfix_str(" ".join(job))
                if verbose:
                    tqdm.write(str({key: value for key, value in row.items() if value != ""}))
    return made


@dataclass
class _Running:
    """A child that works on one job."""

    process: Any
    pipe: Connection
    start: float

    def ended(self, others: Mapping[Any, _Running]) -> bool:
        wait([child.pipe for child in others.values()], timeout=1.0)
        return self.pipe.poll() or time.time() > self.start + LIMIT_SECONDS

    def row(self, model_type: str, condition: str) -> dict[str, str]:
        try:
            found = self.pipe.recv() if self.pipe.poll() else {"verdict": "crash", "reason": f"over {LIMIT_SECONDS} s"}
        except EOFError:
            self.process.join()
            found = {"verdict": "crash", "reason": f"ended with code {self.process.exitcode}"}
        self.process.kill()
        self.process.join()
        row = {"model_type": model_type, "condition": condition, **found}
        row |= {"seconds": f"{time.time() - self.start:.1f}", "transformers": transformers.__version__}
        return {field: _text(row.get(field, "")) for field in FIELDS}


def _start(model_type: str, condition: str) -> _Running:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(model_type, condition, theirs))
    process.start()
    theirs.close()
    return _Running(process, ours, time.time())


def _child(model_type: str, condition: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    from scripts.differential.one import compare  # only here: it imports the package, and the parent stays small

    with tempfile.TemporaryDirectory(prefix="differential-") as folder:
        tempfile.tempdir = folder
        try:
            found = compare(model_type, condition)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = {"verdict": "crash", "reason": f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"}
    pipe.send(found)


def table(rows: list[dict[str, str]]) -> str:
    """Verdicts by condition, and what is neither equal nor refused, with its reason."""
    verdicts = [name for name, _ in Counter(row["verdict"] for row in rows).most_common()]
    lines = [f"| condition | {' | '.join(verdicts)} |", "|---" * (len(verdicts) + 1) + "|"]
    for condition in CONDITIONS:
        counts = Counter(row["verdict"] for row in rows if row["condition"] == condition)
        if counts:
            lines.append(f"| {condition} | {' | '.join(str(counts[name]) for name in verdicts)} |")
    equal = [row for row in rows if row["verdict"] == "equal"]
    lines += ["", f"Equal: {sum(int(row['sites']) for row in equal)} sites, {sum(int(row['rows']) for row in equal)} rows."]
    for verdict in ("WRONG", "crash"):
        found = [row for row in rows if row["verdict"] == verdict]
        lines += (
            ["", *(f"{verdict}: {row['model_type']} {row['condition']}: {row['reason']}" for row in found)] if found else []
        )
    return "\n".join(lines)


def append(results: Path, row: dict[str, str]) -> None:
    """Add a row; one of the same model and condition is replaced."""
    key = row["model_type"], row["condition"]
    rows = [r for r in read(results) if (r["model_type"], r["condition"]) != key] + [row]
    results.parent.mkdir(parents=True, exist_ok=True)
    partial = results.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: (r["model_type"], CONDITIONS.index(r["condition"]))))
    partial.replace(results)


def _text(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else " ".join(str(value).split())[:400]


if __name__ == "__main__":
    main()
