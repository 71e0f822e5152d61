"""What a model is made of: its transformers parts, its modules by name, and which of them are activations."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel, activations

from ..activation.module import LambdaGELU
from .computed_base import computed_base
from .config import STOCK_KEYS


def _class_bases() -> dict[type[nn.Module], str]:
    """{class: base} of what `ACT2CLS` builds under the family's names; an entry that another package put there is probed."""
    found: dict[type[nn.Module], str] = {nn.SiLU: "silu"}
    for key, base in STOCK_KEYS.items():
        entry = activations.ACT2CLS.get(key)
        cls = entry[0] if isinstance(entry, tuple) else entry
        if isinstance(cls, type) and cls.__module__.startswith(("torch.nn.", activations.__name__)):
            found[cls] = base
    return found


_CLASS_BASES = _class_bases()


def base_of(module: nn.Module) -> str | None:
    """The base whose λ = 1 this stock activation module is, or None if it is not of the family."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _CLASS_BASES.get(type(module))


def probed_base(module: nn.Module) -> str | None:
    """The base whose λ = 1 the module computes, by its class or, of a class that is not known, by what it makes of numbers.

    Only of a module without children, parameters, buffers and state, and not of torch's own others: see `computed_base`.
    """
    base = base_of(module)
    if base is not None or type(module).__module__.startswith("torch.nn.") or isinstance(module, LambdaGELU):
        return base
    return computed_base(module)


def transformers_parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """{module name: model} of the outermost transformers models in `model`, itself under the name "" if it is one."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return found


def wrapped_part(model: nn.Module) -> str | None:
    """The name of the transformers model in `model` that has all of its parameters (in DistributedDataParallel, what
    torch.compile makes, averages of weights); None where there is no such, or `model` is one itself."""
    parameters = {id(parameter) for parameter in model.parameters()}
    for name, part in transformers_parts(model).items():
        if name and parameters <= {id(parameter) for parameter in part.parameters()}:
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
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=False)
    return modules
