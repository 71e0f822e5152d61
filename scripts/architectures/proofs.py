"""Every architecture that converts: saved as a ReLU network, and proven without inputs being given, as its users do it.

    python -m scripts.architectures.proofs                       # what is not in the CSV yet; half an hour on one core
    python -m scripts.architectures.proofs --models bert vit     # these, and print them

Of each row of results/coverage.csv that is exact, a tiny model is converted, substituted, saved by `save_relu_pretrained`
and proven twice with inputs that the package makes: as the model in memory (`verify_relu_pretrained`), and as the folder
that a command line is given. The stock process of a proof is a fork of one that has imported transformers and
never this package. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tqdm.auto import tqdm

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import stock_process
from hf_lambda_gelu.checkpoints.hub import check_card
from hf_lambda_gelu.checkpoints.save import check_relu
from hf_lambda_gelu.checkpoints.verify import prove
from hf_lambda_gelu.structure.loading import load_saved
from scripts.architectures.run import RESULTS as COVERAGE
from scripts.architectures.run import append
from scripts.architectures.tiny_models import tiny_model
from scripts.tools.tables import read
from scripts.tools.warm_stock import run_in_stock

RESULTS = COVERAGE.with_name("proofs.csv")
FIELDS = ["model_type", "auto", "class", "verdict", "in_memory", "folder", "reason", "transformers"]
LIMIT_SECONDS, LIMIT_BYTES = 240, 12 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.architectures.proofs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", metavar="TYPE", help="model types; by default all that convert exactly")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    exact = [(row["model_type"], row["auto"]) for row in read(COVERAGE) if row["verdict"] == "exact"]
    if options.models:
        jobs = [job for job in exact if job[0] in options.models]
    else:
        done = {(row["model_type"], row["auto"]) for row in read(options.results)}
        jobs = [job for job in exact if job not in done]
        jobs = [job for start in range(16) for job in jobs[start::16]]  # so that some of each kind come early
    run_in_stock("", [], os.getcwd(), os.environ)  # here, so that all children have the one that starts now
    stock_process.run_apart = run_in_stock
    with tqdm(total=len(jobs), disable=None) as bar:
        for job in jobs:
            row = proof(*job)
            append(options.results, row, FIELDS)
            bar.update()
            bar.set_postfix_str(job[0])
            if options.models or row["verdict"] != "proven":
                tqdm.write(str({key: value for key, value in row.items() if value != ""}))
    print(dict(Counter(row["verdict"] for row in read(options.results))))


def proof(model_type: str, auto: str) -> dict[str, str]:
    """The row of an architecture, worked on in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(model_type, auto, theirs))
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
    return {field: " ".join(str(row.get(field, "")).split())[:400] for field in FIELDS}


def _child(model_type: str, auto: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # drawing takes longer than all else
    row: dict[str, Any] = {}
    place = ""
    try:
        with tempfile.TemporaryDirectory(prefix="proofs-") as scratch:
            place = f"{scratch}/"  # which a table does not name
            _prove(row, model_type, auto, Path(scratch, "relu"))
        row["verdict"] = "proven"
    except Exception as error:
        refused = isinstance(error, ValueError) and not isinstance(error, hlg.CheckpointError)
        reason = f"{type(error).__name__}: {error}".replace(place, "")
        row |= {"verdict": "refused" if refused else "failed", "reason": reason}
    pipe.send(row)


def _prove(row: dict[str, Any], model_type: str, auto: str, folder: Path) -> None:
    model = tiny_model(model_type, auto)
    row["class"] = type(model).__name__
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    hlg.save_relu_pretrained(model, folder)
    row["in_memory"] = f"{hlg.verify_relu_pretrained(model, folder):.1e}"
    loaded = load_saved(folder)  # what the commands verify and push make of a folder
    check_relu(loaded)
    check_card(folder)
    row["folder"] = f"{prove(loaded, folder).difference:.1e}"


if __name__ == "__main__":
    main()
