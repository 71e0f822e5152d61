"""What torch computes, what onnxruntime computes from the exported file, and whether that is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._compat import pytree
from ...measurement.batches import FORWARD_ERRORS
from ...measurement.difference import difference
from ...measurement.forward import call, same_random_numbers
from .files import run, session
from .report import ExportError

# max |onnxruntime − torch| relative to the largest output: 1e-5 that `fold` may make of λ in the weights, and as much again
# for fp32 sums in another order (4e-6 is the most that was met)
TOLERANCE = 2e-5


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What forward returns, by name, in the order in which torch.export flattens it.

    Raises:
        ValueError: forward does not take the inputs, or returns what has no values to compare.
    """
    try:
        with torch.no_grad(), same_random_numbers(model):
            output = call(model, {name: value.clone() for name, value in batch.items()})
    except FORWARD_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__} does not take inputs of {shapes_of(batch)}: {type(error).__name__}: {error}"
        ) from error
    named: dict[str, Tensor] = {}
    for name, value in output.items():
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        name = f"output_{name}" if name.isdigit() or name in batch else name
        named |= {name if len(leaves) == 1 else f"{name}_{index}": leaf for index, leaf in enumerate(leaves)}
    if not named:
        raise ValueError(f"{type(model).__name__} returns no tensor, so there is nothing to export")
    nan = next((name for name, value in named.items() if bool(torch.isnan(value).any())), None)
    if nan is not None:
        raise ValueError(
            f"torch's {nan} has NaN, which nothing can be compared with: pass inputs=… on which the model gives numbers"
        )
    return named


def loaded(made: Path) -> Any:
    """onnxruntime's session of the file; ExportError if it takes none."""
    try:
        return session(made)
    except Exception as error:  # onnxruntime's classes derive from Exception alone
        raise ExportError(f"onnxruntime does not load what torch exported: {in_a_line(error)}") from error


def compared(ready: Any, model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """max |onnxruntime − torch| on these inputs, relative to the largest value of each output.

    Raises:
        ExportError: it is more than rounding, or onnxruntime fails.
    """
    expected = [value.detach().cpu() for value in outputs(model, batch).values()]
    try:
        got = run(ready, batch)
    except Exception as error:
        raise ExportError(
            f"onnxruntime fails on inputs of {shapes_of(batch)}: {in_a_line(error)}. If a size cannot change, keep it fixed "
            "by dynamic={…}"
        ) from error
    found = difference(expected, got)
    if not found <= TOLERANCE:
        raise ExportError(
            f"on inputs of {shapes_of(batch)} the outputs of onnxruntime differ from torch's by {found:.2g} (relative), "
            f"more than rounding ({TOLERANCE:g}): the file would be another network"
        )
    return found


def in_a_line(error: BaseException) -> str:
    """The start of its message."""
    return " ".join(str(error).split())[:400]


def shapes_of(batch: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name → sizes."""
    return {name: tuple(value.shape) for name, value in batch.items()}
