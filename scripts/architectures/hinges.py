"""Every architecture that converts: four ReLUs in the place of each gate, in wider layers, or the reason why not.

    python -m scripts.architectures.hinges                       # what is not in the CSV yet; half an hour on one core
    python -m scripts.architectures.hinges --models bert vit     # these, and print them
    python -m scripts.architectures.hinges --table               # the summary of docs/coverage.md

Of each row of results/coverage.csv that is exact, a tiny model is converted and gets `relu_ize(hinges=4)`, without data.
What comes out is held against the ReLU network in which modules that compute Σᵢ aᵢ max(x − tᵢ, 0) in fp64 stand in the place
of the gates that became wider, and is saved, reloaded by stock transformers and compared. Where it is refused, the model
must be what it was. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import stock_process
from hf_lambda_gelu.structure.config import get_attribute
from hf_lambda_gelu.surgery.hinges.minimax import minimax
from scripts.architectures.checks import difference, outputs, wake
from scripts.architectures.run import RESULTS as COVERAGE
from scripts.architectures.run import append
from scripts.architectures.tiny_models import example_inputs, tiny_model
from scripts.tools.tables import read
from scripts.tools.warm_stock import run_in_stock

RESULTS = COVERAGE.with_name("hinges.csv")
FIELDS = [
    "model_type",
    "auto",
    "class",
    "verdict",
    "wider",
    "single",
    "widths",
    "biases",
    "effect",
    "sum",
    "reload",
    "reason",
    "transformers",
]
HINGES = 4
LIMIT_SECONDS, LIMIT_BYTES = 240, 12 * 2**30
# of the largest output, in fp32: the network adds the same terms in another order, a few hundred at a time
ROUNDING = 2e-5


class Sum(nn.Module):
    """Σᵢ aᵢ max(x − tᵢ, 0), in fp64."""

    def __init__(self, base: str, hardness: float) -> None:
        super().__init__()
        self.found, self.hardness = minimax(base, HINGES), hardness

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.double() * self.hardness
        pairs = zip(self.found.at, self.found.weights, strict=True)
        return (sum(a * (scaled - t).clamp(min=0.0) for t, a in pairs) / self.hardness).to(x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.architectures.hinges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", metavar="TYPE", help="model types; by default all that convert exactly")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the summary of the results and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.results)))
        return
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
            row = in_its_own_process(*job)
            append(options.results, row, FIELDS)
            bar.update()
            bar.set_postfix_str(job[0])
            if options.models or row["verdict"] not in ("exact", "refused"):
                tqdm.write(str({key: value for key, value in row.items() if value != ""}))
    print(dict(Counter(row["verdict"] for row in read(options.results))))


def in_its_own_process(model_type: str, auto: str) -> dict[str, str]:
    """The row of an architecture."""
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
        with tempfile.TemporaryDirectory(prefix="hinges-") as scratch:
            place = f"{scratch}/"  # which a table does not name
            _widen(row, model_type, auto, Path(scratch, "relu"))
    except Exception as error:
        row |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}".replace(place, "")}
    pipe.send(row)


def _widen(row: dict[str, Any], model_type: str, auto: str, folder: Path) -> None:
    model = tiny_model(model_type, auto)
    wake(model)  # or a layer scale of 1e-6 hides what a layer puts out
    row["class"] = type(model).__name__
    batch = example_inputs(model)
    hlg.convert(model)
    bases = {name: site.base for name, site in hlg.hardness_sites(model).items()}
    smooth = outputs(model, batch)
    twin = copy.deepcopy(model)
    try:
        report = hlg.relu_ize(model, True, hinges=HINGES).hinges  # heads keep one ReLU
    except hlg.HingeError as error:
        row |= {"verdict": "refused", "reason": str(error)}
        if difference(smooth, outputs(model, batch)) > 0:
            row |= {"verdict": "changed"}
        return
    assert report is not None
    row |= {"wider": len(report.sites), "single": len(report.single), "reason": next(iter(report.single.values()), "")}
    row["widths"] = " ".join(f"{path}={before:g}→{now:g}" for path, (before, now) in report.widths.items())
    row["biases"] = " ".join(path for path in _switches(twin.config) if get_attribute(model.config, path) is True)
    hlg.relu_ize(twin, force=True)
    _put_sums(twin, {site.name: bases[site.name] for site in report.sites})
    expected, got = outputs(twin, batch), outputs(model, batch)
    row["effect"], row["sum"] = f"{difference(smooth, expected):.1e}", f"{difference(expected, got):.1e}"
    if float(row["sum"]) > ROUNDING:  # random networks may blow rounding up
        with contextlib.suppress(RuntimeError):  # a class that is not for fp64
            row["sum"] = f"{difference(*(_in_double(each, batch) for each in (twin, model))):.1e}"
    hlg.save_relu_pretrained(model, folder)
    row["reload"] = f"{hlg.verify_relu_pretrained(model, folder):.1e}"
    row["verdict"] = verdict(row)


def _switches(config: PreTrainedConfig, prefix: str = "") -> Iterator[str]:
    """Paths of what is False and named for biases."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _switches(value, f"{prefix}{name}.")
        elif value is False and "bias" in name:
            yield f"{prefix}{name}"


def _in_double(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    return outputs(copy.deepcopy(model).double(), doubled)


def _put_sums(model: nn.Module, bases: dict[str, str]) -> None:
    """Sums in the place of these sites, under each of their names."""
    for name, base in bases.items():
        old, new = model.get_submodule(name), Sum(base, 1.0)
        for place, module in list(model.named_modules(remove_duplicate=False)):
            if module is old:
                owner, _, leaf = place.rpartition(".")
                setattr(model.get_submodule(owner), leaf, new)


def verdict(row: dict[str, Any]) -> str:
    """exact; or differs."""
    return "exact" if float(row["sum"]) <= ROUNDING and float(row["reload"]) == 0.0 else "differs"


_WHY = {
    "has no bias, and no config": "the gate's map has no bias, and the config no switch for one",
    "an expert's": "experts, whose weights are slices of one parameter",
    "is cut in parts": "one map makes gate and up together",
    "stands between|unlike shapes|make its units": "something else stands between the maps",
    "no number in the config is its width": "its width is in no number of the config",
    "in no block that can be told": "the number in the config is the width of other maps too",
    "no input reached": "made-up inputs do not reach it",
}


def table(rows: list[dict[str, str]]) -> str:
    """Counts by verdict, and the reasons of refusals."""
    counts = Counter(row["verdict"] for row in rows)
    lines = [f"{len(rows)} architectures and heads, transformers {rows[-1]['transformers']}", ""]
    lines += ["| verdict | models |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in counts.most_common()]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] != "exact":
            reasons.setdefault(why(row), []).append(row["model_type"])
    lines += ["", "| not wider because | models |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(dict.fromkeys(names))} |" for reason, names in sorted(reasons.items())]
    return "\n".join(lines)


def why(row: dict[str, str]) -> str:
    """The kind of a reason."""
    return next((kind for pattern, kind in _WHY.items() if re.search(pattern, row["reason"])), row["reason"][:90])


if __name__ == "__main__":
    main()
