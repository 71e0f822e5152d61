"""What users pass as calibration data that is none, or means something else to the model than to them: said in words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..structure.config import config_of


def loader_fault(loader: object) -> str | None:
    """Why these are no batches at all; None if they may be."""
    if isinstance(loader, (str, bytes)):
        return (
            f"the calibration set is a {type(loader).__name__}: expected batches, mappings of what the model's forward takes"
        )
    if isinstance(loader, Mapping):
        return f"the calibration set is one {type(loader).__name__}: expected several, pass a list of such batches, [batch]"
    return None


def tuple_fault(model: nn.Module, batch: Sequence[Any], accepted: Sequence[str]) -> str | None:
    """Why it cannot be told which arguments the tensors of a tuple are; None if it can.

    Loaders give labels beside inputs, which an argument that forward has a default for would take for something else.
    """
    parameters = inspect.signature(model.forward).parameters
    needed = sum(name not in parameters or parameters[name].default is inspect.Parameter.empty for name in accepted)
    if len(batch) <= max(1, needed) or len(accepted) <= needed:
        return None
    return (
        f"is {len(batch)} tensors, and {type(model).__name__}.forward takes {', '.join(accepted[: len(batch)])}, not all of "
        "which it needs: labels would be taken for an argument. Give a mapping, {name: tensor}"
    )


def input_fault(model: nn.Module, batch: Mapping[str, Any], kept: Mapping[str, Any], takes: str) -> str | None:
    """Why a batch has nothing for forward in it; None if it has.

    Args:
        kept: what of it forward takes.
        takes: what forward takes, in words.
    """
    inputs = {name: value for name, value in kept.items() if name != "labels"}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if any(value.numel() for value in tensors.values()):
        return None
    if tensors:
        return f"is empty: {shapes(tensors)}"
    listed = next((name for name, value in inputs.items() if isinstance(value, (list, tuple))), None)
    if listed is not None:
        return (
            f"has {listed} as a {type(kept[listed]).__name__}: expected tensors, as tokenizers make with return_tensors='pt'"
        )
    return (
        f"holds {', '.join(map(repr, batch)) or 'nothing'}: no tensor in it is an input of {type(model).__name__}.forward, "
        f"which takes {takes}"
    )


def pads_that_count(model: nn.Module, batch: Mapping[str, Any], accepted: Sequence[str] | None) -> int:
    """How many rows of tokens begin or end with padding that no mask says, so that it counts as text."""
    ids, config = batch.get("input_ids"), config_of(model)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or config is None or "attention_mask" in batch:
        return 0
    if accepted is not None and "attention_mask" not in accepted:  # there is none to give
        return 0
    pad, *others = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    if not isinstance(pad, int) or pad in others:
        return 0
    return int(((ids[:, 0] == pad) | (ids[:, -1] == pad)).sum()) if ids.numel() else 0


def shapes(batch: Mapping[str, Any]) -> str:
    """The tensors of a batch, and their sizes."""
    return ", ".join(f"{n} {' × '.join(map(str, v.shape))}" for n, v in batch.items() if isinstance(v, Tensor))
