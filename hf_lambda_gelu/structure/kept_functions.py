"""Functions that modules keep as attributes: `self.act = F.gelu`, a `partial` of it, lists and dicts of such.

They are no modules, so no swap of modules reaches them; torch's own transformer layers, whose way of calling theirs is
known, are the exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .computed_base import base_of_function
from .config import STOCK_KEYS

_PLACES = ("torch._C._nn", "torch.nn.functional", "torch._ops", "torch.ops", "transformers.activations")
_HINTS = ("act", "nonlin", *(key for key in STOCK_KEYS if not any(k in key for k in STOCK_KEYS if k != key)))
_STOCK: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}
# what accelerate and torch.compile keep on a module
_PLUMBING = {"forward", "_old_forward", "_compiled_call_impl", "call_super_init"}


@dataclass(frozen=True)
class KeptFunction:
    """A function of the family: where the module keeps it (`act`, `acts[1]`), what it is called, and its base."""

    attribute: str
    what: str
    base: str


def kept_functions(module: nn.Module) -> list[KeptFunction]:
    """The functions of the family that `module`, or its class, keeps as attributes; children have their own."""
    found = list(_found(module, vars(module)))
    named = {item.attribute for item in found} | set(vars(module))
    cls: Any = type(module)
    return found + [item for item in _of_class(cls) if item.attribute not in named]


def stock_module(base: str) -> nn.Module | None:
    """torch's own module that computes the base; None where torch has none."""
    made = _STOCK.get(base)
    return made() if made is not None else None


def function_of_torch_layer(module: nn.Module) -> KeptFunction | None:
    """What torch's transformer layers keep as `activation`, by default a function: they call it with one tensor."""
    if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return None
    return next((item for item in kept_functions(module) if item.attribute == "activation"), None)


@cache
def _of_class(cls: type) -> tuple[KeptFunction, ...]:
    found: dict[str, KeptFunction] = {}
    for owner in cls.__mro__:
        if owner is nn.Module:
            break
        # methods are no attributes of this kind: they take the module
        values = {n: v.__func__ if isinstance(v, staticmethod) else v for n, v in vars(owner).items() if not _method(v)}
        found.update({item.attribute: item for item in _found(None, values) if item.attribute not in found})
    return tuple(found.values())


def _method(value: Any) -> bool:
    return isinstance(value, (FunctionType, classmethod, property))


def _found(module: nn.Module | None, attributes: dict[str, Any]) -> Iterator[KeptFunction]:
    for attribute, value in list(attributes.items()):
        if attribute.startswith("__") or attribute in _PLUMBING or attribute.endswith(("_hooks", "_hooks_with_kwargs")):
            continue
        for place, function in _functions(attribute, value):
            base = _base(module, place, function)
            if base is not None:
                yield KeptFunction(place, _label(function), base)


def _functions(place: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Callable[..., Any]]]:
    if isinstance(value, (list, tuple)) and depth < 3:
        for index, item in enumerate(value):
            yield from _functions(f"{place}[{index}]", item, depth + 1)
    elif type(value) is dict and depth < 3:
        for key, item in value.items():
            yield from _functions(f"{place}[{key!r}]", item, depth + 1)
    elif callable(value) and not isinstance(value, (nn.Module, type, torch.Tensor)):
        yield place, value


def _base(module: nn.Module | None, place: str, function: Callable[..., Any]) -> str | None:
    """The base that the function computes, by its values; None for others, and those that are not to be tried."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    name = _label(function).lower()
    if isinstance(inner, MethodType):
        owner = inner.__self__
        bare = isinstance(owner, nn.Module) and not any(True for _ in owner.parameters())
        if not bare and not any(hint in name for hint in _HINTS[1:]):
            return None
    origin = getattr(inner, "__module__", None) or ""
    known = origin.startswith(_PLACES)
    if not known and not any(hint in f"{place} {name}".lower() for hint in _HINTS):
        return None
    return base_of_function(function)


def _label(function: Any) -> str:
    if isinstance(function, partial):
        given = [repr(a) for a in function.args] + [f"{k}={v!r}" for k, v in function.keywords.items()]
        return f"partial({', '.join([_label(function.func), *given])})"
    if isinstance(function, MethodType) and not isinstance(function.__self__, nn.Module):
        return str(function.__name__)
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__name__
    return str(name).rpartition("<locals>.")[2]
