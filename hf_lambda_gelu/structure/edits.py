"""The only place that edits a model: modules put in the place of others, configs rewritten with their copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import get_attribute, set_attribute


def own_config(model: PreTrainedModel) -> None:
    """Give `model` and its parts a config of their own: `Model(config)` keeps the caller's, which another model may hold."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                if id(value) not in copies:
                    copy.deepcopy(value, copies)
                setattr(module, name, copies[id(value)])


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place called `name`, on the device and in the train/eval mode of what was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    new.train(getattr(parent, leaf).training)
    tensor = next(parent.parameters(), None)
    if tensor is None:
        tensor = next(model.parameters(), torch.empty(0))
    setattr(parent, leaf, new.to(tensor.device))


def update_config_copies(model: PreTrainedModel, path: str, before: str, after: str) -> None:
    """Carry a change of `model.config` into the copies of that config that submodules hold.

    Encoder and decoder of T5 hold deep copies; code of theirs that reads the attribute in forward must see the change.
    """
    parent, _, leaf = path.rpartition(".")
    owner = get_attribute(model.config, parent) if parent else model.config
    for module in model.modules():
        config = getattr(module, "config", None)
        is_copy = isinstance(config, PreTrainedConfig) and config is not owner and type(config) is type(owner)
        if is_copy and getattr(config, leaf, None) == before:
            set_attribute(config, leaf, after)
