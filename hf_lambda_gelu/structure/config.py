"""What a config says of activations: the attributes that name one, read and set so that a reload follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedConfig

from ..activation.bases import BASES

# transformers' name of an activation that tends to ReLU → its base
STOCK_KEYS: dict[str, str] = {key: base.name for base in BASES.values() for key in base.stock_keys}
LAMBDA_KEYS: dict[str, str] = {base.key: base.name for base in BASES.values()}


def activation_attributes(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, value) of the config attributes whose value names a GELU, a SiLU or a λ-GELU, sub-configs included."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from activation_attributes(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (value in STOCK_KEYS or value in LAMBDA_KEYS):
            yield f"{prefix}{name}", value


def get_attribute(config: PreTrainedConfig, path: str) -> object:
    """The value at a dotted path."""
    owner, name = owner_of(config, path)
    return getattr(owner, name)


def set_attribute(config: PreTrainedConfig, path: str, value: str) -> bool:
    """Set the attribute so that it survives saving and loading; False, with nothing changed, if it cannot.

    T5's `dense_act_fn` is derived from `feed_forward_proj` ("gated-gelu") when a config is built. Attributes of the same
    config from which this one is derived are set along with it.
    """
    trial = copy.deepcopy(config)
    owner, name = owner_of(trial, path)
    changes = {name: value}
    for source, text in vars(owner).items():
        if isinstance(text, str) and source != name and _derives(type(owner), source, text, name):
            head, dash, _ = text.rpartition("-")
            changes[source] = head + dash + value
    for attribute, new in changes.items():
        setattr(owner, attribute, new)
    if reloaded_value(trial, path) != value:
        return False
    target, _ = owner_of(config, path)
    for attribute, new in changes.items():
        setattr(target, attribute, new)
    return True


def _derives(cls: type[PreTrainedConfig], source: str, text: str, name: str) -> bool:
    """Whether building a config with `source` = "…-tanh" in place of "…-gelu" makes `name` tanh."""
    head, dash, last = text.rpartition("-")
    if last not in STOCK_KEYS and last not in LAMBDA_KEYS:
        return False
    build: Callable[..., PreTrainedConfig] = cls
    try:
        return getattr(build(**{source: f"{head}{dash}tanh"}), name, None) == "tanh"
    except (MemoryError, OSError):  # says nothing of the class
        raise
    except Exception:  # the class refuses the value
        return False


def owner_of(config: PreTrainedConfig, path: str) -> tuple[PreTrainedConfig, str]:
    """The config or sub-config that holds the value at a dotted path, and the attribute's name there."""
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


def reloaded_value(config: PreTrainedConfig, path: str) -> object:
    """The value at a dotted path once the config was saved and loaded, None if it does not survive that."""
    try:
        return get_attribute(type(config).from_dict(config.to_dict()), path)
    except (MemoryError, OSError):  # says nothing of the class
        raise
    except Exception:  # a config may refuse the value while it is built: then it does not survive
        return None


def config_of(model: nn.Module) -> PreTrainedConfig | None:
    """The config of a transformers model, or of one in a wrapper that shows it (PEFT's)."""
    config = getattr(model, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None
