"""What an ONNX export feeds: the inputs, the names of the sizes that may change, and the same inputs in other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...measurement.batches import FORWARD_ERRORS, CalibrationError, accepted_names, batch_size, model_batches
from ...measurement.examples.choice import example_inputs
from ...measurement.examples.config_search import find
from ...measurement.forward import call

Axes = dict[str, dict[int, str]]  # input → {dimension: the name of its size}


@dataclass(frozen=True)
class Feed:
    """Which sizes may change, the inputs that the export is traced with, and those that the file is checked on."""

    axes: Axes
    traced: dict[str, Tensor]
    checked: list[dict[str, Tensor]]


_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
_IMAGE = "pixel_values"
_SOUND = "input_values"


def inputs_of(model: nn.Module, given: Any, encoder_of: PreTrainedModel | None = None) -> dict[str, Tensor]:
    """The tensors that forward will take: those given, cut to what it takes; else an example, with a mask where it has one.

    Args:
        given: a mapping as a tokenizer returns it; for modules that are not transformers' also a tensor or a tuple.
        encoder_of: the whole model, where `model` is its encoder: its example has the encoder's inputs.

    Raises:
        ValueError: nothing given, and no example can be made; or what is given is no input of forward's.
    """
    if given is None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"no inputs can be guessed for {type(model).__name__}: pass inputs=…, what its forward takes")
        names = accepted_names(model)
        example = {n: v for n, v in example_inputs(encoder_of or model).items() if names is None or n in names}
        ids = example.get("input_ids")
        if ids is not None and ids.dim() == 2 and "attention_mask" not in example and "attention_mask" in (names or ()):
            example["attention_mask"] = torch.ones_like(ids)
            example["attention_mask"][-1, -2:] = 0
        return example
    try:
        (batch,) = model_batches(model, [given])
    except CalibrationError as error:  # it tells of a loader's batch
        raise ValueError(str(error).replace("calibration batch 0", "inputs=…")) from error
    others = [name for name, value in batch.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"inputs[{others[0]!r}] is a {type(batch[others[0]]).__name__}: expected tensors alone")
    return {name: value for name, value in batch.items() if name != "labels"}


def dynamic_axes(model: nn.Module, batch: Mapping[str, Tensor]) -> Axes:
    """Which sizes may change: examples, tokens, samples of a sound, an image's sides where the model takes others."""
    count = batch_size(model, batch)
    sound = _SOUND in batch and batch[_SOUND].dim() == 2
    kinds = {"samples" if sound else "sequence": (_SOUND, *_TEXT) if sound else _TEXT, "decoder_sequence": _DECODER}
    axes: Axes = {}
    for name, value in batch.items():
        axes[name] = {0: "batch"} if value.dim() and len(value) == count else {}
        for kind, names in kinds.items():
            if name in names and value.dim() > 1 and value.shape[1] == _length(batch, names):
                axes[name][1] = kind
    if _IMAGE in batch and batch[_IMAGE].dim() == 4:
        sides = {**axes[_IMAGE], 2: "height", 3: "width"}
        other = resized(batch, {_IMAGE: sides}, smaller(model, batch, {_IMAGE: sides}, "height", "width"))
        if _runs(model, other):
            axes[_IMAGE] = sides
    return axes


def feed(model: nn.Module, batch: dict[str, Tensor], axes: Axes) -> Feed:
    """The batch in sizes of its own to trace with; to check on, as it is and, if sizes may change, with others."""
    checked = [batch]
    if any(axes.values()):
        checked.append(resized(batch, axes, smaller(model, batch, axes)))
    return Feed(axes, resized(batch, axes, distinct(model, batch, axes)), checked)


def check_axes(axes: Mapping[str, Mapping[int, str]], batch: Mapping[str, Tensor]) -> Axes:
    """The axes that a caller names, for each input.

    Raises:
        ValueError: an input or a dimension that there is not, or one name for two sizes.
    """
    sizes: dict[str, int] = {}
    for name, named in axes.items():
        if name not in batch:
            raise ValueError(f"dynamic names the input {name!r}: the inputs are {', '.join(batch)}")
        for dim, axis in named.items():
            if not 0 <= dim < batch[name].dim():
                raise ValueError(f"dynamic[{name!r}] names dimension {dim}: its shape is {tuple(batch[name].shape)}")
            size = batch[name].shape[dim]
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"dynamic calls two sizes {axis!r}, {sizes[axis]} and {size}: give them names of their own")
    return {name: dict(axes.get(name, {})) for name in batch}


def sizes_of(batch: Mapping[str, Tensor], axes: Axes) -> dict[str, int]:
    """Name of an axis → its size in the batch."""
    return {axis: batch[name].shape[dim] for name, named in axes.items() for dim, axis in named.items()}


def resized(batch: Mapping[str, Tensor], axes: Axes, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The batch with axes of other sizes: cut, or begun again from the start."""
    made = {}
    for name, value in batch.items():
        for dim, axis in axes.get(name, {}).items():
            if axis in sizes and value.shape[dim] != sizes[axis]:
                index = torch.arange(sizes[axis], device=value.device) % value.shape[dim]
                value = value.index_select(dim, index)
        made[name] = value.contiguous()
    return made


def smaller(model: nn.Module, batch: Mapping[str, Tensor], axes: Axes, *only: str) -> dict[str, int]:
    """Another size for each axis (of these names): half of the tokens or samples, a patch less of an image, one example.

    Where there is nothing to take away, it is more.
    """
    made = {}
    for axis, size in sizes_of(batch, axes).items():
        if axis in ("height", "width"):
            step = _patch(model) * (1 if axis == "height" else 2)
            made[axis] = size - step if size > step else size + step
        elif axis == "batch":
            made[axis] = 1 if size > 1 else 3
        else:
            made[axis] = size // 2 if size > 1 else 2
    return {axis: size for axis, size in made.items() if not only or axis in only}


def distinct(model: nn.Module, batch: Mapping[str, Tensor], axes: Axes) -> dict[str, int]:
    """A size for each axis to trace with: no two alike, none 1. torch.export takes equal sizes for one, and 1 as fixed."""
    made: dict[str, int] = {}
    for axis, size in sizes_of(batch, axes).items():
        step = _patch(model) if axis in ("height", "width") else 1
        down = axis in ("height", "width", "sequence", "decoder_sequence")  # more might be more than the model takes
        while size < 2 or size in made.values():
            size += -step if down and size - step > 1 and size - step not in made.values() else step
        made[axis] = size
    return made


def _length(batch: Mapping[str, Tensor], names: tuple[str, ...]) -> int:
    return next((batch[name].shape[1] for name in names if name in batch and batch[name].dim() > 1), 0)


def _patch(model: nn.Module) -> int:
    """What the sides of an image are multiples of, as far as the config tells."""
    patch = find(model.config, "patch_size", default=32) if isinstance(model, PreTrainedModel) else 32
    return max(patch) if isinstance(patch, (list, tuple)) else int(patch)


def _runs(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    try:
        with torch.no_grad():
            call(model, batch)
    except FORWARD_ERRORS:
        return False
    return True
