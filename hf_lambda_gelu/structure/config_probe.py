"""Finds which modules of a model each config attribute governs, by building the model again with a probe.

Names and class lists age; the modelling code does not lie. A probe class is put under a private key into transformers'
activation table, `type(model)(config)` is rebuilt on the meta device with one config attribute set to that key, and the
modules where the probe appears are exactly those that a stock reload builds from that attribute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, activations
from transformers.activations import ACT2CLS, ACT2FN

from ..activation.bases import BASES
from ..activation.module import LambdaGELU

_PROBE_KEY = "_lambda_gelu_probe"

# transformers' names of the activations that tend to ReLU, by base
STOCK_KEYS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
LAMBDA_KEYS: dict[str, str] = {base.key: base.name for base in BASES.values()}

_CLASS_BASES: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
}


class _Probe(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass(frozen=True)
class Governed:
    """A config attribute, its value, and the modules that it decides.

    Attributes:
        path: the attribute as a dotted path from the model's config, e.g. "text_config.hidden_act".
        value: its value, a key of transformers' activation table.
        modules: names of the modules that are built from it, in network order; a shared instance under all its names.
        failure: why that could not be found out, or cannot be used: the model class takes no other activation there, or
            keeps the name itself.
    """

    path: str
    value: str
    modules: tuple[str, ...]
    failure: str = ""


def base_of(module: nn.Module) -> str | None:
    """The base whose λ = 1 this stock activation module is, or None if it is not of the family."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _CLASS_BASES.get(type(module))


def probed_base(module: nn.Module) -> str | None:
    """The base whose λ = 1 the module computes, by its class or, of a class that is not known, by what it makes of numbers.

    Only of a module without children, parameters and buffers, and not of torch's own others.
    """
    base = base_of(module)
    if base is not None or type(module).__module__.startswith("torch.nn.") or isinstance(module, LambdaGELU):
        return base
    if any(True for _ in chain(module.children(), module.parameters(), module.buffers())):
        return None
    x = torch.linspace(-6.0, 6.0, 241)
    with torch.no_grad(), torch.random.fork_rng(devices=()), torch.device("cpu"):
        try:
            y = module(x.clone())
        except Exception:  # not a function of one tensor
            return None
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or not y.is_floating_point():
            return None
        return next((b.name for b in BASES.values() if torch.allclose(y, b.activation(x), rtol=0.0, atol=2e-6)), None)


def transformers_parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """{module name: model} of the outermost transformers models in `model`, itself under the name "" if it is one."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model: its checkpoints then hold these alone."""
    return hasattr(model, "merge_and_unload") or bool(getattr(model, "_hf_peft_config_loaded", False))


def quantised_weight(model: nn.Module) -> str | None:
    """The name of a weight that is quantised (bitsandbytes, torchao): its elements cannot be scaled or refit."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao"):
            return name
    return None


def joined(prefix: str, name: str) -> str:
    """`prefix.name`, or the one of them that is not empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation at all, as torch and transformers define them."""
    return (
        isinstance(module, LambdaGELU)
        or type(module) in _CLASS_BASES
        or (
            type(module).__module__ in ("torch.nn.modules.activation", activations.__name__)
            and not isinstance(module, nn.MultiheadAttention)
        )
    )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with a shared instance under each of its names (xlm and flaubert share one activation)."""
    return model.named_modules(remove_duplicate=False)


def activation_attributes(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, value) of the config attributes whose value names a GELU, a SiLU or a λ-GELU, sub-configs included."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from activation_attributes(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (value in STOCK_KEYS or value in LAMBDA_KEYS):
            yield f"{prefix}{name}", value


def get_attribute(config: PreTrainedConfig, path: str) -> object:
    """The value at a dotted path."""
    owner, name = _owner(config, path)
    return getattr(owner, name)


def put_attribute(config: PreTrainedConfig, path: str, value: str) -> None:
    """Set the value at a dotted path, for the time being; `set_attribute` is for changes that are to be saved."""
    owner, name = _owner(config, path)
    setattr(owner, name, value)


def governed_modules(model: PreTrainedModel) -> list[Governed]:
    """What each activation attribute of `model.config` governs; attributes that govern no module have none."""
    return [_governed(model, path, value) for path, value in activation_attributes(model.config)]


def bias_attribute(model: PreTrainedModel, wanted: set[str]) -> tuple[str, dict[str, int]] | None:
    """The config attribute that gives linear maps a bias (Llama's `mlp_bias`), found like the governed modules are.

    Args:
        wanted: names of the bias parameters that are to be.

    Returns:
        Its dotted path, and {name: length} of all bias parameters that it adds; of several such attributes the one that adds
        the fewest. None if there is none.
    """
    names = {name for name, _ in model.named_parameters()}
    found: list[tuple[str, dict[str, int]]] = []
    for path in _switched_off(model.config):
        config = copy.deepcopy(model.config)
        owner, name = _owner(config, path)
        setattr(owner, name, True)
        if _reloaded(config, path) is not True:
            continue
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=()):
                rebuilt = type(model)(config)
        except Exception:  # a class that does not take it
            continue
        added = {n: p.numel() for n, p in rebuilt.named_parameters() if n not in names}
        if wanted <= set(added) and all(n.endswith("bias") for n in added):
            found.append((path, added))
    return min(found, key=lambda item: len(item[1])) if found else None


def _switched_off(config: PreTrainedConfig, prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _switched_off(value, f"{prefix}{name}.")
        elif value is False and "bias" in name:
            yield f"{prefix}{name}"


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


def set_attribute(config: PreTrainedConfig, path: str, value: str) -> bool:
    """Set the attribute so that it survives saving and loading; False, with nothing changed, if it cannot.

    T5's `dense_act_fn` is derived from `feed_forward_proj` ("gated-gelu") when a config is built. Attributes of the same
    config from which this one is derived are set along with it.
    """
    trial = copy.deepcopy(config)
    owner, name = _owner(trial, path)
    changes = {name: value}
    for source, text in vars(owner).items():
        if isinstance(text, str) and source != name and _derives(type(owner), source, text, name):
            head, dash, _ = text.rpartition("-")
            changes[source] = head + dash + value
    for attribute, new in changes.items():
        setattr(owner, attribute, new)
    if _reloaded(trial, path) != value:
        return False
    target, _ = _owner(config, path)
    for attribute, new in changes.items():
        setattr(target, attribute, new)
    return True


def _derives(cls: type[PreTrainedConfig], source: str, text: str, name: str) -> bool:
    """Whether building a config with `source` = "…-tanh" in place of "…-gelu" makes `name` tanh."""
    head, dash, last = text.rpartition("-")
    if last not in STOCK_KEYS and last not in LAMBDA_KEYS:
        return False
    try:
        return getattr(cls(**{source: f"{head}{dash}tanh"}), name, None) == "tanh"
    except Exception:  # the class refuses the value
        return False


def _owner(config: PreTrainedConfig, path: str) -> tuple[PreTrainedConfig, str]:
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


def _reloaded(config: PreTrainedConfig, path: str) -> object:
    try:
        return get_attribute(type(config).from_dict(config.to_dict()), path)
    except Exception:  # a config may refuse the value while it is built: then it does not survive
        return None


def _governed(model: PreTrainedModel, path: str, value: str) -> Governed:
    try:
        names, holders = _probed(model, path)
        if holders:  # Mamba's convolutions: kernels that know the name "silu", and something else for any other
            failure = f"{holders[0]} keeps its name, for code that may do something else than look it up"
            return Governed(path, value, (), failure)
        return Governed(path, value, tuple(names))
    except Exception as error:  # modelling code of its own kind (openai-gpt has its own table): not ours to crash on
        return Governed(path, value, (), f"{type(error).__name__}: {error}")


def _probed(model: PreTrainedModel, path: str) -> tuple[list[str], list[str]]:
    """The modules that are built from the attribute, and attributes of modules that keep its value."""
    config = copy.deepcopy(model.config)
    owner, name = _owner(config, path)
    setattr(owner, name, _PROBE_KEY)
    with _probe_registered(), torch.device("meta"), torch.random.fork_rng(devices=()):  # some draw on the CPU all the same
        rebuilt = type(model)(config)
    modules = list(named_modules(rebuilt))
    holders = [joined(n, a) for n, m in modules for a, v in vars(m).items() if isinstance(v, str) and v == _PROBE_KEY]
    return [name for name, module in modules if isinstance(module, _Probe)], holders


@contextmanager
def _probe_registered() -> Iterator[None]:
    ACT2FN[_PROBE_KEY] = ACT2CLS[_PROBE_KEY] = _Probe
    try:
        yield
    finally:
        del ACT2FN[_PROBE_KEY], ACT2CLS[_PROBE_KEY]
