"""Runs a model: in eval mode, on one batch, and finds the main output of what it returns."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat import attention_implementations, forward_before_accelerate, pytree
from ..structure import random_state
from ..structure.autocast import Autocast
from ..structure.config import config_of
from ..structure.edits import without_caches
from ..structure.observers import observers_off
from .batches import FORWARD_ERRORS, CalibrationError, forward_failed, takes_a_mapping


@contextlib.contextmanager
def measuring(model: nn.Module, in_run: bool = False) -> Iterator[None]:
    """`evaluating`, without key-value caches, as in training, and config.problem_type as it was.

    Into the last, classifiers write when they first see labels. A cache changes what some models compute: packed sequences
    are kept apart only without.
    """
    config = config_of(model)
    before = None if config is None else vars(config).get("problem_type")
    try:
        with evaluating(model, in_run), without_caches(model):
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
        raise forward_failed(model, index, error, batch) from error


def call(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """What forward returns, as a mapping."""
    if takes_a_mapping(model):  # which it may write into
        return _as_mapping(model(dict(batch)))
    extra = {"return_dict": True} if _takes_return_dict(model) and "return_dict" not in batch else {}
    return _as_mapping(model(**batch, **extra))


def _as_mapping(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Mapping):
        return output
    return {str(i): value for i, value in enumerate(output if isinstance(output, (tuple, list)) else [output])}


def _takes_return_dict(model: nn.Module) -> bool:
    """Whether the forward of a transformers model takes `return_dict`: by name, or out of its `**kwargs` by that key.

    transformers' decorators take it out of them (`can_return_tuple`); what a forward merely passes on may go to one that
    does not take it.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if "return_dict" in inspect.signature(model.forward).parameters:
        return True
    function: Any = model.forward
    while function is not None:
        inner = getattr(function, "__func__", function)
        code = getattr(inner, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_VARKEYWORDS and "return_dict" in code.co_consts:
            return True
        function = getattr(inner, "__wrapped__", None)
    return False


def main_output(output: Mapping[str, Any]) -> Tensor:
    """The logits of a model output, or its first floating point tensor other than the loss; of several, the first."""
    named = {"logits": output.get("logits"), **{name: value for name, value in output.items() if name != "loss"}}
    for leaf in pytree.tree_leaves(list(named.values())):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ValueError(f"the model's output holds no tensor to compare: {', '.join(output)}")


@contextlib.contextmanager
def evaluating(model: nn.Module, in_run: bool = False) -> Iterator[None]:
    """Within the block, `model` is in eval mode; afterwards every module is in the mode that it was in.

    What torch.compile made of it is not run within the block, but what it was made from: compiled code does not know hooks.
    Nor is accelerate's autocast, which a training with bf16 leaves on the model's forward, and no file holds: in bf16, what
    hard gates change is lost in rounding. A block of autocast around this one, a user's own, stays. Fake
    quantisation notes no ranges.

    Args:
        in_run: whether a training goes on around the block, in whose autocast the model then runs.
    """
    modes = {module: module.training for module in model.modules()}
    _forget_texts(model)
    model.eval()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            contextlib.nullcontext() if in_run else _without_accelerate(model),
            observers_off(model),
        ):
            yield
    finally:
        _forget_texts(model)
        for module, training in modes.items():
            module.training = training


def _forget_texts(model: nn.Module) -> None:
    """Empties what OmDet-Turbo keeps of the texts that it has read, whatever becomes of its weights and activations."""
    for module in model.modules():
        for kept in vars(module).values():
            if isinstance(getattr(kept, "cache", None), OrderedDict):
                kept.cache.clear()


@contextlib.contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` computes as when it is loaded anew: without accelerate's autocast or a user's own."""
    with _without_accelerate(model), Autocast.now(model).off.entered():
        yield


@contextlib.contextmanager
def _without_accelerate(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's forward is the one that accelerate has wrapped in autocast, if it runs without."""
    wrapped, own = vars(model).get("forward"), None if _wants_half(model) else forward_before_accelerate(model)
    if own is not None:
        vars(model)["forward"] = own
    try:
        yield
    finally:
        if own is not None:
            vars(model)["forward"] = wrapped


def _wants_half(model: nn.Module) -> bool:
    """Whether its attention takes half precision alone, which its weights do not have."""
    weight = next((parameter for parameter in model.parameters() if parameter.dim() > 1), None)
    whole = weight is not None and weight.dtype in (torch.float32, torch.float64)
    return whole and any("flash" in name for name in attention_implementations(model).values())


def random_state_kept(model: nn.Module | None) -> contextlib.AbstractContextManager[None]:
    """Within the block, random numbers may be drawn; afterwards all draw as if they had not been (BigBird seeds NumPy)."""
    devices = set() if model is None else {parameter.device for parameter in model.parameters()}
    return random_state.random_state_kept(*devices)


def same_random_numbers(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`random_state_kept`, and the numbers drawn are the same each time: ViLT's forward draws which patches it takes."""
    devices = {parameter.device for parameter in model.parameters()}
    accelerator = next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))
    return random_state.random_numbers_from(0, accelerator)
