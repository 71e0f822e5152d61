"""The only place that edits a model: modules put in the place of others, configs rewritten with their copies."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .._compat import share_hooks
from .block_source import source_of
from .config import LAMBDA_KEYS, activation_attributes, get_attribute, owner_of, set_attribute
from .config_probe import config_places, copied_configs
from .second_records import keep_records_true
from .shard_source import ShardSource

M = TypeVar("M", bound=nn.Module)


def own_config(model: PreTrainedModel, within: nn.Module | None = None) -> None:
    """Give `model` and its parts a config of their own: `Model(config)` keeps the caller's, which another model may hold.

    Args:
        within: what `model` is a part of: a wrapper that shows the same config (PEFT's) gets the new one too.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    inside = set(model.modules())
    for module in (model if within is None else within).modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and (module in inside or id(value) in copies):
                if id(value) not in copies:
                    copy.deepcopy(value, copies)
                setattr(module, name, copies[id(value)])


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place called `name`, on the device, in the train/eval mode and with the hooks of what was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    before: nn.Module = getattr(parent, leaf)
    new.train(before.training)
    share_hooks(before, new)
    tensor = next(parent.parameters(), None)
    device = next(model.parameters(), torch.empty(0, device=None)).device if tensor is None else tensor.device
    setattr(parent, leaf, new.to(device))
    keep_records_true(model, name)


def replace_everywhere(model: nn.Module, modules: Iterable[M], new: Callable[[M], nn.Module]) -> None:
    """Put `new(module)` in the place of each of `modules`, under every name by which the model holds it."""
    wanted = {id(module): module for module in modules}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in wanted:
            replace_module(model, name, new(wanted[id(module)]))


def set_activation(model: PreTrainedModel, path: str, *keys: str, within: nn.Module | None = None) -> str | None:
    """Let `config.path` name another activation, in the model's own config and the copies that its submodules hold.

    Encoder and decoder of T5 hold deep copies; code of theirs that reads the attribute in forward must see the change. What
    is a copy, and not a config that happens to be alike, is found by building the class again (`copied_configs`).

    Args:
        keys: transformers' names of activations; the first that survives saving and loading is set.
        within: as for `own_config`.

    Returns:
        The key that was set; None, with no attribute changed, if the config keeps none of them.
    """
    before = get_attribute(model.config, path)
    own_config(model, within)
    copies = copied_configs(model, path)
    leaf = path.rpartition(".")[2]
    for key in keys:
        if set_attribute(model.config, path, key):
            for config in copies:
                if getattr(config, leaf) == before:
                    set_attribute(config, leaf, key)
            return key
    return None


def set_bias(model: PreTrainedModel, path: str, value: bool) -> None:
    """Let `config.path`, the switch of linear maps' biases (Llama's `mlp_bias`), have this value, in its copies too.

    The parameters are another matter: see `add_bias`. The model must have a config of its own: see `own_config`.
    """
    owner, leaf = owner_of(model.config, path)
    for config in (owner, *copied_configs(model, path)):
        setattr(config, leaf, value)


def add_bias(model: nn.Module, name: str, length: int) -> nn.Parameter:
    """Put a bias of zeros (length,) under this name, where the module has room for one that is None.

    Its dtype, device and `requires_grad` are those of the module's weight. Where FSDP2 has cut that up, every process has
    all of the bias, and it is not trained: FSDP2 does not know it, and would leave each process its own gradient.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    like = next(owner.parameters())
    source = source_of(model)
    zeros = torch.zeros(length, dtype=like.dtype, device=like.device if source is None else source.device)
    bias = nn.Parameter(zeros, requires_grad=like.requires_grad and not isinstance(source, ShardSource))
    owner.register_parameter(leaf, bias)
    return bias


def remove_bias(model: nn.Module, name: str) -> None:
    """Undo `add_bias`; nothing changes where there is no bias."""
    owner_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner_name), leaf, None)


def reshape(parameter: nn.Parameter, data: Tensor) -> None:
    """Let the parameter have data of another shape; its gradient goes.

    Autograd notes the shape of a parameter that is in a graph, and forgets it where the dtype changes, not the shape.
    """
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=torch.complex64, device=parameter.device)
    parameter.data = data


def lambda_keys(model: nn.Module) -> list[tuple[PreTrainedConfig, str, str]]:
    """(config, attribute, key) of each place in a config in `model`, or in a config within it, that names a λ-GELU."""
    configs = {id(c): c for module in model.modules() if isinstance(c := getattr(module, "config", None), PreTrainedConfig)}
    found = [(*owner_of(c, path), k) for c in configs.values() for path, k in activation_attributes(c) if k in LAMBDA_KEYS]
    return list({(id(owner), name): (owner, name, key) for owner, name, key in found}.values())


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Within the block, no config in `model` asks for a key-value cache: it would carry state from run to run.

    Configs may be replaced by copies within the block: what is switched on again is what is there then.
    """
    asking = {place for place, config in config_places(model, "use_cache") if config.use_cache is True}
    try:
        for place, config in config_places(model, "use_cache"):
            if place in asking:
                config.use_cache = False
        yield
    finally:
        for place, config in config_places(model, "use_cache"):
            if place in asking:
                config.use_cache = True
