"""Finds which modules of a model each config attribute governs, by building the model again with a probe.

Names and class lists age; the modelling code does not lie. A probe class is put under a private key into transformers'
activation table, `type(model)(config)` is rebuilt on the meta device with one config attribute set to that key, and the
modules where the probe appears are exactly those that a stock reload builds from that attribute.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

from .config import LAMBDA_KEYS, STOCK_KEYS, activation_attributes, owner_of, reloaded_value
from .held_names import held_names
from .modules import joined, named_modules

_PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu", "prelu", "linear")
_PROBES = itertools.count()  # each probe has a key of its own: another thread may be probing too


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
        kept: whether the failure is that the model keeps the name.
    """

    path: str
    value: str
    modules: tuple[str, ...]
    failure: str = ""
    kept: bool = False


def governed_modules(model: PreTrainedModel) -> list[Governed]:
    """What each activation attribute of `model.config` governs; attributes that govern no module have none."""
    return [_governed(model, path, value) for path, value in activation_attributes(model.config)]


def other_activations(model: PreTrainedModel) -> list[Governed]:
    """The config attributes that name an activation which is neither ReLU nor of its family (mish, tanh …) and is built."""
    found = [_governed(model, path, value) for path, value in _named_activations(model.config)]
    return [attribute for attribute in found if attribute.modules]


def _named_activations(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _named_activations(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value in ACT2FN and value not in (*STOCK_KEYS, *LAMBDA_KEYS, *_PIECEWISE_LINEAR):
            yield f"{prefix}{name}", value


def bias_attributes(model: PreTrainedModel, wanted: set[str]) -> tuple[tuple[str, ...], dict[str, int]] | None:
    """The config attributes that give linear maps a bias (Llama's `mlp_bias`), found like the governed modules are.

    Args:
        wanted: names of the bias parameters that are to be.

    Returns:
        Their dotted paths, and {name: length} of all bias parameters that they add; of several attributes that will do alone
        the one that adds the fewest; several where none will, as each of two towers has its own. None if there are none.
    """
    names = {name for name, _ in model.named_parameters()}
    off = list(_switched_off(model.config))
    found = [((path,), added) for path in off if (added := _biases_by(model, (path,), names))]
    alone = [item for item in found if wanted <= set(item[1])]
    if alone:
        return min(alone, key=lambda item: len(item[1]))
    owners: dict[str, list[str]] = {}
    for path in off:
        owners.setdefault(path.rpartition(".")[0], []).append(path)
    groups = [tuple(paths) for paths in owners.values() if len(paths) > 1]  # of which a class takes all or none
    return _covering(found, wanted) or _covering([(g, a) for g in groups if (a := _biases_by(model, g, names))], wanted)


def _covering(
    found: Sequence[tuple[tuple[str, ...], dict[str, int]]], wanted: set[str]
) -> tuple[tuple[str, ...], dict[str, int]] | None:
    """Several that together add what is wanted, the most useful first; None if all together do not."""
    paths: tuple[str, ...] = ()
    lengths: dict[str, int] = {}
    while wanted - set(lengths):
        left = wanted - set(lengths)
        best = max(found, key=lambda item: (len(left & set(item[1])), -len(item[1])), default=None)
        if best is None or not left & set(best[1]):
            return None
        paths, lengths = paths + best[0], lengths | best[1]
    return paths, lengths


def _biases_by(model: PreTrainedModel, paths: tuple[str, ...], names: set[str]) -> dict[str, int]:
    """{name: length} of the bias parameters that these attributes add; empty if they add others too, or cannot be set."""
    config = copy.deepcopy(model.config)
    for path in paths:
        owner, name = owner_of(config, path)
        setattr(owner, name, True)
    if any(reloaded_value(config, path) is not True for path in paths):
        return {}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=()):
            rebuilt = type(model)(config)
    except (MemoryError, OSError):  # says nothing of the class
        raise
    except Exception:  # a class that does not take it
        return {}
    added = {n: p.numel() for n, p in rebuilt.named_parameters() if n not in names}
    return added if all(n.endswith("bias") for n in added) else {}


def _switched_off(config: PreTrainedConfig, prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _switched_off(value, f"{prefix}{name}.")
        elif value is False and "bias" in name:
            yield f"{prefix}{name}"


def _governed(model: PreTrainedModel, path: str, value: str) -> Governed:
    try:
        names, holders = _probed(model, path)
        if holders:  # Mamba's convolutions: kernels that know the name "silu", and something else for any other
            failure = f"{holders[0]} keeps its name, for code that may do something else than look it up"
            return Governed(path, value, (), failure, kept=True)
        return Governed(path, value, tuple(held_names(model, names)))
    except (MemoryError, OSError):  # says nothing of the modelling code
        raise
    except Exception as error:  # modelling code of its own kind (openai-gpt has its own table): not ours to crash on
        return Governed(path, value, (), f"{type(error).__name__}: {error}")


def _probed(model: PreTrainedModel, path: str) -> tuple[list[str], list[str]]:
    """The modules that are built from the attribute, and attributes of modules that keep its value."""
    config = copy.deepcopy(model.config)
    owner, name = owner_of(config, path)
    key = _probe_key()
    setattr(owner, name, key)
    with (
        _probe_registered(key),
        torch.device("meta"),
        torch.random.fork_rng(devices=()),
    ):  # some draw on the CPU all the same
        rebuilt = type(model)(config)
    modules = list(named_modules(rebuilt))
    holders = [joined(n, a) for n, m in modules for a, v in vars(m).items() if isinstance(v, str) and v == key]
    return [name for name, module in modules if isinstance(module, _Probe)], holders


def copied_configs(model: PreTrainedModel, path: str) -> list[PreTrainedConfig]:
    """The configs in the parts of `model` that its class makes from the one that holds the attribute at `path`.

    The class is built again with another value there; where it turns up, in the same places, are the copies. The same object
    under several names counts once; the one at `path` itself is not among them.
    """
    owner, name = owner_of(model.config, path)
    value = getattr(owner, name)
    key = _probe_key()
    probe = not value if isinstance(value, bool) else key
    config = copy.deepcopy(model.config)
    setattr(*owner_of(config, path), probe)
    try:
        with _probe_registered(key), torch.device("meta"), torch.random.fork_rng(devices=()):
            rebuilt = type(model)(config)
        plain = rebuilt if probe is key else None
        if plain is None:  # others may have the value by themselves
            with torch.device("meta"), torch.random.fork_rng(devices=()):
                plain = type(model)(copy.deepcopy(model.config))
    except (MemoryError, OSError):  # says nothing of the class
        raise
    except Exception:  # a class that does not take it: nothing is known to be a copy
        return []
    before = dict(config_places(plain, name))
    found = {
        place: held
        for place, held in config_places(rebuilt, name)
        if getattr(held, name) == probe and (plain is rebuilt or (place in before and getattr(before[place], name) == value))
    }
    own = dict(config_places(model, name))
    return list({id(own[place]): own[place] for place in found if place in own and own[place] is not owner}.values())


def config_places(model: nn.Module, attribute: str) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """((module, name, name of a sub-config …), config) of the configs held by modules that have the attribute."""
    for module_name, module in named_modules(model):
        held_here = ((n, v) for n, v in vars(module).items() if isinstance(v, PreTrainedConfig))
        pending: list[tuple[tuple[str, ...], PreTrainedConfig]] = [((module_name, n), v) for n, v in held_here]
        while pending:
            place, held = pending.pop()
            if hasattr(held, attribute):
                yield place, held
            pending += [((*place, n), v) for n, v in vars(held).items() if isinstance(v, PreTrainedConfig)]


def _probe_key() -> str:
    """A name in transformers' tables that nobody else has."""
    return f"_lambda_gelu_probe_{next(_PROBES)}"


@contextmanager
def _probe_registered(key: str) -> Iterator[None]:
    try:
        ACT2FN[key] = ACT2CLS[key] = _Probe
        yield
    finally:
        for table in (ACT2FN, ACT2CLS):
            table.pop(key, None)
