"""Forwards that were put in the place of a module's own (fused kernels), and whether such a one can call an activation.

What is rebound is no proof: accelerate's hooks, autocast and PEFT rebind forwards that call the original. A forward counts
as bypassing an activation where all of its code can be read and none of it names the attribute that leads to the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_FOLLOWED = 500  # functions that are read at most; more than that cannot be told
# code that names these may call what cannot be read here
_OPAQUE = {"forward", "_old_forward", "__call__", "_call_impl", "super", "_modules", "get_submodule"}
_OPAQUE |= {"modules", "named_modules", "children", "named_children"}


@dataclass(frozen=True)
class ForeignForward:
    """A forward that is not the one that the module's class was written with.

    Attributes:
        block: the module's name ("": the model itself).
        label: what runs, by its module and name.
        attribute: what of the block leads to the site.
        calls: whether it may call that; False where its code shows that it does not.
    """

    block: str
    label: str
    attribute: str
    calls: bool


def foreign_forwards(model: nn.Module, site: str) -> list[ForeignForward]:
    """Those of the modules that hold the site, the innermost first."""
    found = []
    for block, attribute in holders(model, site):
        module = model.get_submodule(block)
        forward = _foreign(module)
        if forward is not None:
            found.append(ForeignForward(block, _label(forward), attribute, _may_name(forward, attribute, module)))
    return found


def holders(model: nn.Module, site: str) -> Iterator[tuple[str, str]]:
    """(name, attribute) of the modules around the site that have a forward, the innermost first; containers have none."""
    parts = site.split(".")
    for end in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:end])
        if not isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict)):
            yield name, parts[end]


def has_foreign_forwards(model: nn.Module) -> bool:
    """Whether any module has a forward that its class was not written with."""
    return any(_foreign(module) is not None for module in model.modules())


def bypassed_by_code(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """{site: reason} of the sites that a foreign forward around them never calls, as its code shows."""
    found = {}
    for site in sites:
        for foreign in foreign_forwards(model, site):
            if not foreign.calls:
                found[site] = reason(foreign)
                break
    return found


def reason(foreign: ForeignForward) -> str:
    """What is in the way of a site, and what to switch off."""
    where, label = foreign.block or "the model", foreign.label
    return f"the forward of {where} was replaced by {label}, which does not call {foreign.attribute}. {_switch(label)}"


def refusal(reasons: dict[str, str]) -> str:
    """The text of an error about sites that are bypassed."""
    site, why = next(iter(reasons.items()))
    more = f" (and {len(reasons) - 1} more: {', '.join(list(reasons)[1:4])}{' …' if len(reasons) > 4 else ''})"
    return f"{site}{more if len(reasons) > 1 else ''} is not what runs: {why}"


def _switch(label: str) -> str:
    for word, advice in {
        "liger": "Switch Liger off: use_liger_kernel=False, and no apply_liger_kernel_to_…",
        "kernels": "Switch the kernels off: load the model with use_kernels=False, and do not kernelize it",
        "unsloth": "Load the model without Unsloth",
    }.items():
        if word in label.lower():
            return advice
    return "Switch off what does that (a fused kernel?), or load the model again without it"


def _foreign(module: nn.Module) -> Callable[..., Any] | None:
    """The module's forward, if it is bound to the instance, or was put into the class by another file."""
    bound = vars(module).get("forward")
    if bound is not None:
        return bound if callable(bound) else None
    for owner in type(module).__mro__:
        forward = vars(owner).get("forward")
        if forward is not None:
            home = getattr(_innermost(forward), "__module__", owner.__module__)
            return forward if home != owner.__module__ and not owner.__module__.startswith("torch.") else None
    return None


def _innermost(function: Any) -> Any:
    for _ in range(_FOLLOWED):
        inner = getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)
        if inner is None:
            break
        function = inner
    return function


def _label(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"


def _may_name(forward: Any, attribute: str, module: nn.Module) -> bool:
    """Whether code that the forward reaches names the attribute; True too where code cannot be read."""
    queue, seen = [forward], set()
    while queue:
        function = queue.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if len(seen) > _FOLLOWED:
            return True
        if isinstance(function, partial):
            if any(_is_block(value, module) for value in (*function.args, *function.keywords.values())):
                return True
            queue += [v for v in (function.func, *function.args, *function.keywords.values()) if _is_code(v)]
            queue += _wrapped(function)
        elif isinstance(function, MethodType):
            queue.append(function.__func__)
            if function.__self__ is not module and isinstance(function.__self__, nn.Module):
                return True  # the forward of another module, which may be one around this
        elif isinstance(function, FunctionType):
            names = set(_names(function.__code__))
            if attribute in names or names & _OPAQUE:
                return True
            reached = _reached(function, names, module)
            if any(_is_block(value, module) for value in reached):
                return True
            queue += [*filter(_is_code, reached), *_wrapped(function)]
        else:  # an object that is called: a decorator's, or what cannot be read
            called = vars(type(function)).get("__call__")
            if not isinstance(called, FunctionType):
                return True
            queue += [called, *(v for v in vars(function).values() if _is_code(v)), *_wrapped(function)]
    return False


def _wrapped(function: Any) -> list[Any]:
    kept = (getattr(function, name, None) for name in ("__wrapped__", "_torchdynamo_orig_callable"))
    return [inner for inner in kept if inner is not None]


def _reached(function: FunctionType, names: set[str], module: nn.Module) -> list[Any]:
    """What the code names: in its closure, among its globals and defaults, and methods of the module."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    values = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [function.__globals__[name] for name in names if name in function.__globals__]
    values += [getattr(type(module), name) for name in names if isinstance(getattr(type(module), name, None), FunctionType)]
    return values


def _is_block(value: Any, module: nn.Module) -> bool:
    """Whether the value is a part of the module that may hold the site, called without being named."""
    return isinstance(value, nn.Module) and value is not module and any(True for _ in value.children())


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_code(value: Any) -> bool:
    """Whether the value is something that runs and is no part of torch, whose functions call no module of a model."""
    if isinstance(value, (FunctionType, MethodType)):
        return not (value.__module__ or "").startswith("torch.")
    if isinstance(value, (type, nn.Module, torch.Tensor)) or (getattr(value, "__module__", "") or "").startswith("torch."):
        return False
    return isinstance(value, partial) or isinstance(vars(type(value)).get("__call__"), FunctionType)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)
