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
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from torch import Tensor, nn
from transformers import PreTrainedConfig

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.config import get_attribute
from hf_lambda_gelu.surgery.hinges.minimax import minimax
from scripts.architectures.checks import difference, outputs, wake
from scripts.architectures.run import RESULTS as COVERAGE
from scripts.architectures.sweep import sweep
from scripts.architectures.tiny_models import example_inputs, tiny_model
from scripts.tools.tables import read

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
    sweep(_widen, options.results, FIELDS, options.models, good=["exact", "refused"])


def _widen(row: dict[str, Any], model_type: str, auto: str, folder: Path) -> None:
    model = tiny_model(model_type, auto)
    wake(model)  # or a layer scale of 1e-6 hides what a layer puts out
    row["class"] = type(model).__name__
    batch = example_inputs(model)
    hlg.convert(model)
    bases = {name: site.base for name, site in hlg.hardness_sites(model).items()}
    smooth = outputs(model, batch)
    twin, again = copy.deepcopy(model), copy.deepcopy(model)
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
    _put_sums(twin, {site.name: bases[site.name] for site in report.sites})
    expected, got = outputs(twin, batch), outputs(model, batch)
    row["effect"], row["sum"] = f"{difference(smooth, expected):.1e}", f"{difference(expected, got):.1e}"
    if float(row["sum"]) > ROUNDING:  # random networks may blow rounding up
        with contextlib.suppress(RuntimeError):  # a class that is not for fp64
            row["sum"] = f"{_in_double(again, batch, bases):.1e}"
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


def _in_double(model: nn.Module, batch: dict[str, Tensor], bases: dict[str, str]) -> float:
    """How far the wider layers are from the sums, of a model in fp64 from the start."""
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    wide, twin = model.double(), copy.deepcopy(model).double()
    report = hlg.relu_ize(wide, True, hinges=HINGES).hinges
    assert report is not None
    _put_sums(twin, {site.name: bases[site.name] for site in report.sites})
    return difference(outputs(twin, batch), outputs(wide, batch))


def _put_sums(model: nn.Module, bases: dict[str, str]) -> None:
    """ReLU in the model, and sums in the place of these sites, under each of their names."""
    hlg.relu_ize(model, force=True)
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
    "stacks of experts' weights": "experts, whose weights are stacks without biases",
    "is cut in parts": "one map makes its units and others",
    "stands between|unlike shapes|make its units|and another none|feeds a conv": "something else stands between the maps",
    "no number in the config is its width": "its width is in no number of the config",
    "in no block that can be told": "the number in the config is the width of other maps too",
    "is tied to": "its weights are another layer's too",
    "as it rounds": "its ratio cannot say so many units",
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
