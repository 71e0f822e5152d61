"""What a person reads while a Trainer runs: λ of all layers in a few characters, and some lines at the switch.

The logs hold λ of every layer, for `trainer_state.json` and for loggers; a line of text cannot. The callbacks that print are
told shorter logs, each as an instance: transformers' classes stay as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from logging import WARNING
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from .._compat import write_beside_bars
from ..surgery.hinges.report import HingeReport
from ..surgery.refit.report import CompensationReport

PREFIX = "hardness/"  # and the module's name: λ in the logs
_BLOCKS, _DIGITS = "▁▂▃▄▅▆▇█", "01234567"
_WIDTHS = 3  # of layers, by how wide they are; there are seldom more
_CELLS = 24  # in a profile; of more sites, some share one
_FLAT = 1e-3  # relative: λ that differ by less are called the same
_WIDE = 10.0  # from this ratio on, cells are in log λ


def profile_line(values: Iterable[float]) -> str:
    """λ of all sites, in network order, in one line: lowest, highest, and the shape of the profile.

    Examples:
        >>> from hf_lambda_gelu.training.console import profile_line
        >>> profile_line([1.0, 1.25, 1.5])
        '1–1.5 ▁▅█'
        >>> profile_line([159.58] * 12)
        '159.6 in every layer'
    """
    values = list(values)
    broken = sum(not math.isfinite(value) for value in values)
    if broken or not values:
        return f"{broken} of {len(values)} are no numbers"
    low, high = min(values), max(values)
    if high - low <= _FLAT * low:
        return f"{low:.4g} in every layer" if len(values) > 1 else f"{low:.4g}"
    blocks, dash = (_BLOCKS, "–") if _printable(_BLOCKS + "–") else (_DIGITS, "-")
    scale = math.log if high > _WIDE * low else float
    span = scale(high) - scale(low)
    top = len(blocks) - 1
    cells = [blocks[round(top * (scale(value) - scale(low)) / span)] for value in _cells(values)]
    return f"{low:.4g}{dash}{high:.4g} {''.join(cells)}"


def shorten(callbacks: Iterable[TrainerCallback], logs: Mapping[str, Any]) -> None:
    """Lets the callbacks that print the logs, and a notebook's table, show one line for the λ of all layers.

    Callbacks with an `on_log` of their own are told everything.
    """
    notebook = getattr(sys.modules.get("transformers.utils.notebook"), "NotebookProgressCallback", ())
    for callback in callbacks:
        if type(callback).on_log in (PrinterCallback.on_log, ProgressCallback.on_log):
            vars(callback)["on_log"] = partial(_on_log, callback)
        elif isinstance(callback, notebook):
            tracker = getattr(callback, "training_tracker", None)
            if tracker is not None and (values := _hardness(logs)):
                vars(tracker)["write_line"] = partial(_write_line, tracker, profile_line(values))


def shortened(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The logs with one entry in the place of λ of each layer."""
    rest = {name: value for name, value in logs.items() if not name.startswith(PREFIX)}
    values = _hardness(logs)
    return {**rest, "λ" if _printable("λ") else "lambda": profile_line(values)} if values else rest


def say(text: str) -> None:
    """Prints on standard output, above a progress bar, unless transformers is to tell of errors alone."""
    if logging.get_verbosity() <= WARNING:
        if not _printable(text):
            encoding = sys.stdout.encoding or "ascii"
            text = text.encode(encoding, "replace").decode(encoding)
        write_beside_bars(text)


def switch_lines(step: int, steps: int, learned: Sequence[float], now: Sequence[float], then: str) -> str:
    """What a person is told at the switch of a run.

    Args:
        learned, now: λ of each site, as learned and as it is or is on its way to.
        then: what became of the maps, or of λ, in one line.
    """
    name, arrow = ("λ", "→") if _printable("λ→") else ("lambda", "->")
    moved = f"{profile_line(learned)} {arrow} {profile_line(now)}"
    return f"hardness: switch after step {step} of {steps}: {name} {moved}\n  {then}"


def refit_line(report: CompensationReport, hinges: HingeReport | None = None) -> str:
    """A refit in one line, or more where layers became wider or sites were left out; `trainer.compensation` has all."""
    sites = report.sites
    lines = [] if hinges is None else [width_line(hinges)]
    if sites:
        before, after = (sum(each) / len(sites) for each in ([s.before for s in sites], [s.after for s in sites]))
        worst = max(sites, key=lambda site: site.after)
        lines.append(
            f"the maps after {len(sites)} activations were refit in {report.seconds:.0f} s: relative error on held-out rows "
            f"{before:.3f} before, {after:.3f} after (mean; largest {worst.after:.3f}, {worst.name})"
        )
    if report.uncompensated:
        name, reason = next(iter(report.uncompensated.items()))
        lines.append(f"not refit: {len(report.uncompensated)} sites, {name} the first ({reason})")
    return "\n  ".join(lines) or "nothing was refit"


def width_line(report: HingeReport) -> str:
    """What hinges made of the layers, in one line; `print(trainer.hinges)` has the table."""
    arrow = "→" if _printable("→") else "->"
    units = sorted({site.units for site in report.sites})
    shown = ", ".join(f"{before} {arrow} {now}" for before, now in units[:_WIDTHS]) + (", …" if len(units) > _WIDTHS else "")
    return f"{len(report.sites)} layers are wider now, several ReLUs in the place of a gate: {shown} units"


def _on_log(
    callback: TrainerCallback, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    short = shortened(logs or {})
    flos = "total_flos" in short
    found = type(callback).on_log(callback, args, state, control, logs=short, **kwargs)
    if logs is not None and flos and "total_flos" not in short:
        del logs["total_flos"]  # as the callback would have done it
    return found


def _write_line(tracker: Any, line: str, values: dict[str, Any]) -> None:
    type(tracker).write_line(tracker, {**values, "λ": line})


def _hardness(logs: Mapping[str, Any]) -> list[float]:
    return [value for name, value in logs.items() if name.startswith(PREFIX)]


def _cells(values: Sequence[float]) -> list[float]:
    """The values, or the means of neighbours where there are more than fit."""
    count = min(len(values), _CELLS)
    bounds = [len(values) * i // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]


def _printable(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
