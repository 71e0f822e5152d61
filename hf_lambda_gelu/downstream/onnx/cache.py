"""Decoders that take the keys and values of what came before, as tensors by name, and return those of all so far.

The inputs `past_key_values.3.key` and `.value`, and the outputs `present.3.key` and `.value`, are those of layer 3, (batch,
heads, positions, size of a head); before the first token there are 0 positions. Of an encoder-decoder model the encoder
returns `cross.3.key` and `.value`, which the decoder's layers make of its last hidden state, and each step takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...measurement.batches import FORWARD_ERRORS
from ...measurement.difference import difference
from .comparison import TOLERANCE
from .inputs import Axes, Feed, resized
from .report import ExportError

_PAST, _PRESENT, _CROSS = "past_key_values", "present", "cross"
# (examples, positions before, new ones, of the encoder): no two alike, nor their sum, for torch.export takes equals for one
_TRACED = (2, 5, 3, 7)


class Step(nn.Module):
    """A decoder on new tokens after others, whose keys and values it is given."""

    def __init__(self, model: Any, width: int = 0) -> None:
        """`width`: of the encoder's last hidden state, 0 without an encoder."""
        super().__init__()
        self.model, self.width = model, width

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        past: Any = _cache(_PAST, inputs)
        given = {name: value for name, value in inputs.items() if "." not in name}
        if self.width:
            keys = inputs[f"{_CROSS}.0.key"]
            unread = keys.new_zeros(keys.shape[0], keys.shape[2], self.width)  # what is made of it is given
            past = EncoderDecoderCache(past, _cache(_CROSS, inputs))
            found = self.model(**given, encoder_outputs=BaseModelOutput(unread), past_key_values=past, use_cache=True)
            past = found.past_key_values.self_attention_cache
        else:
            found = self.model(**given, **positions(self.model, given), past_key_values=past, use_cache=True)
            past = found.past_key_values
        return {**_first(found), **_tensors(_PRESENT, past)}


class EncoderStep(nn.Module):
    """The encoder, with the keys and values that the decoder's layers make of what it returns."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.model.get_encoder()(**inputs, return_dict=True)
        first = torch.zeros(hidden[0].shape[0], 1, dtype=torch.long, device=hidden[0].device)
        mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
        found = self.model(**mask, decoder_input_ids=first, encoder_outputs=hidden, use_cache=True)
        return {"last_hidden_state": hidden[0], **_tensors(_CROSS, found.past_key_values.cross_attention_cache)}


class InOneMapping(nn.Module):
    """What torch.export takes in place of a forward whose arguments have dots in their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self.model(**inputs)


def with_cache(model: Any, batch: dict[str, Tensor], encoder: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """The part of a model that is to be exported, and the inputs of the whole of which its own are made.

    Raises:
        ValueError: a model that keeps no keys and values, keeps them in a way of its own, or takes more than tokens.
    """
    both = "decoder_input_ids" in batch
    if not both:
        if not {"input_ids"} <= batch.keys() <= {"input_ids", "attention_mask"}:
            raise ValueError(f"with cache=True a decoder takes input_ids and attention_mask alone, got {', '.join(batch)}")
        batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        try:
            found = model(**batch, use_cache=True)
            past = found.past_key_values
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{type(model).__name__} keeps no keys and values ({error}): leave cache=True out") from error
    kind = EncoderDecoderCache if both else DynamicCache
    if type(past) is not kind:
        raise ValueError(
            f"{type(model).__name__} keeps a {type(past).__name__}, expected {kind.__name__}: leave cache=True out"
        )
    if not encoder:
        return Step(model, found.encoder_last_hidden_state.shape[-1] if both else 0), batch
    return EncoderStep(model), {name: value for name, value in batch.items() if not name.startswith("decoder_")}


def steps(step: Step, batch: dict[str, Tensor]) -> Feed:
    """The inputs of single steps: to trace, and to check the start of a text, its end, and its second half.

    Raises:
        ExportError: step by step the model computes something else than at once.
    """
    ids = "decoder_input_ids" if step.width else "input_ids"
    length = max(4, batch[ids].shape[1])
    source = batch["input_ids"].shape[1] if step.width and "input_ids" in batch else 0
    sizes = [
        (len(batch[ids]), length // 2, length - length // 2, source),
        (1, 0, length, max(1, source // 2)),
        (1, length - 1, 1, source),
    ]
    new, of_mask = ("decoder_sequence", "sequence") if step.width else ("sequence", "past_and_sequence")
    traced = _step_inputs(step, batch, *_TRACED)
    axes: Axes = {name: {0: "batch"} for name in traced}
    axes[ids][1] = new
    if "attention_mask" in axes:
        axes["attention_mask"][1] = of_mask
    for name in traced:
        if name.startswith(_PAST):
            axes[name][2] = "past"
        elif name.startswith(_CROSS) and source:
            axes[name][2] = "sequence"
    return Feed(axes, traced, [_step_inputs(step, batch, *each) for each in sizes])


@torch.no_grad()
def _step_inputs(step: Step, batch: dict[str, Tensor], count: int, past: int, new: int, source: int) -> dict[str, Tensor]:
    """The inputs of one step of so many examples, with `new` tokens after `past` ones."""
    ids = "decoder_input_ids" if step.width else "input_ids"
    of_tokens = (ids,) if step.width else (ids, "attention_mask", "position_ids")
    axes: Axes = {name: {0: "batch"} for name in batch}
    for name in batch:
        if name in of_tokens:
            axes[name][1] = "tokens"
        elif name in ("input_ids", "attention_mask"):
            axes[name][1] = "source"
    given = resized(batch, axes, {"batch": count, "tokens": past + new, "source": source})
    counted = {} if step.width else positions(step.model, given)
    expected = _first(step.model(**given, **counted))
    begun = {name: value[:, : max(1, past)] if name in of_tokens else value for name, value in {**given, **counted}.items()}
    empty = EncoderDecoderCache(DynamicCache(), DynamicCache()) if step.width else DynamicCache()  # drops no keys
    try:
        kept: Any = step.model(**begun, past_key_values=empty, use_cache=True).past_key_values
    except FORWARD_ERRORS as error:
        raise ValueError(
            f"{type(step.model).__name__} does not fill a {type(empty).__name__}: {error}. Leave cache=True out"
        ) from error
    made = {name: value for name, value in given.items() if name in (ids, "attention_mask")}
    made[ids] = made[ids][:, past:]
    before = _tensors(_PAST, kept.self_attention_cache if step.width else kept)
    made |= {name: value[:, :, :past].contiguous() for name, value in before.items()}
    made |= _tensors(_CROSS, kept.cross_attention_cache) if step.width else {}
    at_once = [value[:, past:] for value in expected.values()]
    found = difference(at_once, [step(**made)[name] for name in expected])
    if not found <= TOLERANCE:
        raise ExportError(
            f"{type(step.model).__name__} computes something else with a cache ({past} tokens, then {new}) than at once: "
            f"the outputs differ by {found:.2g} (relative). Leave cache=True out"
        )
    return made


def positions(model: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers of the new tokens as `generate` counts them: padding before the text is not counted."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    counted = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {"position_ids": counted[:, -given["input_ids"].shape[1] :]}


def _cache(prefix: str, inputs: Mapping[str, Tensor]) -> DynamicCache:
    found = [value for name, value in inputs.items() if name.startswith(f"{prefix}.")]
    return DynamicCache(list(zip(found[::2], found[1::2], strict=True)))


def _tensors(prefix: str, cache: Any) -> dict[str, Tensor]:
    pairs = ((index, layer.keys, layer.values) for index, layer in enumerate(cache.layers))
    return {
        f"{prefix}.{index}.{name}": value
        for index, *both in pairs
        for name, value in zip(("key", "value"), both, strict=True)
    }


def _first(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's main output by its name: logits, or the last hidden state."""
    name = next(name for name, value in found.items() if isinstance(value, Tensor) and name != "loss")
    return {name: found[name]}
