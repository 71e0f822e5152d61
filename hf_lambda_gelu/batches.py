"""What goes into a model and comes out of it: the batches of a calibration loader, checked; its main output."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class CalibrationError(ValueError):
    """The calibration set cannot be used; the message says what was got and what to do. The model is as it was."""


# what a forward raises when its input does not fit; out of memory is a RuntimeError too
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


def forward_failed(model: PreTrainedModel, index: int, error: Exception) -> Exception:
    """The error to raise when the model's forward raised `error` on a calibration batch."""
    if isinstance(error, CalibrationError):
        return error
    return CalibrationError(
        f"calibration batch {index}: {type(model).__name__}.forward raised {type(error).__name__}: {error}"
    )


def model_batches(model: PreTrainedModel, loader: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches of `loader`, cut to what `model.forward` takes and on the model's device.

    Keys that forward does not take are dropped, as the Trainer does with columns. Labels stay: some models make their
    decoder's input from them.

    Raises:
        CalibrationError: a batch that is no mapping, holds no tensor that the model takes, or has another dtype or device
            than the first; a loader that yields nothing, or nothing but padding.
    """
    accepted = set(inspect.signature(model.forward).parameters) - {"return_dict"}
    first: dict[str, tuple[torch.dtype, torch.device]] = {}
    count, seen = 0, False
    for count, batch in enumerate(loader, 1):
        where = f"calibration batch {count - 1}"
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"{where} is a {type(batch).__name__}: expected a mapping of the model's inputs")
        kept = {name: value for name, value in batch.items() if name in accepted}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        if not any(value.numel() for name, value in tensors.items() if name != "labels"):
            raise CalibrationError(
                f"{where} holds {', '.join(map(repr, batch)) or 'nothing'}: no tensor in it is an input of "
                f"{type(model).__name__}.forward, which takes {model.main_input_name!r}"
            )
        for name, value in tensors.items():
            dtype, device = first.setdefault(name, (value.dtype, value.device))
            if (value.dtype, value.device) != (dtype, device):
                raise CalibrationError(
                    f"{where}: {name} is {value.dtype} on {value.device}, in an earlier batch it was {dtype} on {device}. "
                    "Let the loader yield one dtype on one device"
                )
        seen = seen or any_token(kept)
        yield {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in kept.items()}
    if not count:
        raise CalibrationError(
            "the calibration set yielded no batch: a generator that was consumed before, or an empty loader?"
        )
    if not seen:
        raise CalibrationError("the calibration set holds only padding: its attention mask is 0 everywhere")


def any_token(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has anything but padding in it."""
    mask = batch.get("attention_mask")
    return not isinstance(mask, Tensor) or bool(mask.any())


def token_mask(batch: Mapping[str, Any], decoder: bool = False) -> Tensor | None:
    """(batch, length), True at tokens that are not padding; None if the batch does not say.

    Args:
        decoder: of the decoder's input of an encoder-decoder model. Without a mask for it, positions before a label of −100
            count as padding, as a decoder input made from labels is the labels shifted by one.
    """
    if not decoder:
        mask = batch.get("attention_mask")
    else:
        mask = batch.get("decoder_attention_mask")
        labels = batch.get("labels")
        if mask is None and "decoder_input_ids" not in batch and isinstance(labels, Tensor) and labels.dim() == 2:
            mask = labels != -100
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(…, features) as (rows, features), without the rows of padding where the mask fits the tensor's leading shape.

    It does not fit where a model works on something other than tokens (image patches, or sequences that it unpadded
    itself): then every row counts.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    if mask is None or bool(mask.all()):
        return flat
    if tensor.shape[:-1] == mask.shape or (tensor.dim() == 2 and len(flat) == mask.numel()):
        return flat[mask.reshape(-1).to(flat.device)]
    return flat


def main_output(output: Mapping[str, Any]) -> Tensor:
    """The logits of a model output, or its first floating point tensor other than the loss."""
    if isinstance(output.get("logits"), Tensor):
        return output["logits"]
    for name, value in output.items():
        if name != "loss" and isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"the model's output holds no tensor to compare: {', '.join(output)}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` is in eval mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small deterministic batch for the model's forward, made from its main input name and its config.

    Raises:
        ValueError: the main input is of a kind that cannot be guessed: pass inputs of your own.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    names = {model.main_input_name}
    if text is not config and vision is not config:
        names |= {"input_ids", "pixel_values"}
    batch: dict[str, Tensor] = {}
    if "input_ids" in names:
        batch["input_ids"] = torch.randint(0, text.vocab_size, (2, 8), generator=generator)
    if "pixel_values" in names:
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        batch["pixel_values"] = torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=generator)
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 50)
        batch["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=generator)
    if "input_values" in names:
        batch["input_values"] = torch.randn(1, 4000, generator=generator)
    if not batch:
        raise ValueError(f"cannot make a batch for {type(model).__name__} ({model.main_input_name}): pass inputs=…")
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(0, text.vocab_size, (batch[min(batch)].shape[0], 4), generator=generator)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
