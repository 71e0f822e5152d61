"""Runs a model: in eval mode, on one batch, and finds the main output of what it returns."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ..structure.config import config_of
from .batches import FORWARD_ERRORS, CalibrationError, forward_failed


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and config.problem_type as it was, into which classifiers write when they first see labels."""
    config = config_of(model)
    before = None if config is None else vars(config).get("problem_type")
    try:
        with evaluating(model):
            yield
    finally:
        if config is not None and "problem_type" in vars(config):
            config.problem_type = before


def run_batch(model: nn.Module, batch: Mapping[str, Any], index: int) -> Any:
    """The model's output on the batch of that number; CalibrationError if its forward raises."""
    try:
        return call(model, batch)
    except CalibrationError:
        raise
    except FORWARD_ERRORS as error:
        raise forward_failed(model, index, error) from error


def decoder_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of the decoder of an encoder-decoder model; none for other models."""
    if not getattr(config_of(model), "is_encoder_decoder", False):
        return set()
    decoder: nn.Module | None = cast(PreTrainedModel, model).get_decoder()  # type: ignore[no-untyped-call]
    return set() if decoder is None or decoder is model else set(decoder.modules())  # itself: transformers found none


def call(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """What forward returns, as a mapping."""
    extra = {"return_dict": True} if isinstance(model, PreTrainedModel) else {}
    output = model(**batch, **extra)
    if isinstance(output, Mapping):
        return output
    return {str(i): value for i, value in enumerate(output if isinstance(output, (tuple, list)) else [output])}


def main_output(output: Mapping[str, Any]) -> Tensor:
    """The logits of a model output, or its first floating point tensor other than the loss; of several, the first."""
    named = {"logits": output.get("logits"), **{name: value for name, value in output.items() if name != "loss"}}
    for leaf in pytree.tree_leaves(list(named.values())):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
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


@contextlib.contextmanager
def random_state_kept(model: nn.Module | None) -> Iterator[None]:
    """Within the block, random numbers may be drawn; afterwards Python, NumPy and torch draw as if they had not been."""
    parameters = () if model is None else model.parameters()
    devices = {index for p in parameters if p.is_cuda and (index := p.device.index) is not None}
    state, numbers = random.getstate(), np.random.get_state()  # BigBird seeds NumPy in its forward
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


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
