"""What a module of an unknown class, or a function, computes: one of the four activations or something else, by its numbers.

A module is tried only if trying it changes nothing: one that holds or sets state, prints or writes is left alone. It is
tried on a copy, in both modes and twice: what draws random numbers or depends on the mode is no function.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable
from itertools import chain
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..activation.bases import BASES
from .random_state import random_state_kept

_SPEAKS = {"print", "open", "exec", "eval", "input", "breakpoint", "logger", "logging", "log", "warn", "warnings", "write"}
_CONSTANTS = (bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device, type, PreTrainedConfig)
_RELATIVE = 2e-6  # of |x|: a formula in fp32, with some operations of its own; erf and tanh GELU are 2e-4 of |x| apart


def computed_base(module: nn.Module) -> str | None:
    """The base whose λ = 1 the module computes on numbers from 1e-8 to 1e4 of either sign; None if none, or not tried."""

    def forward(x: Tensor, training: bool) -> Any:
        tried = copy.deepcopy(module)
        tried.training = training
        return tried.forward(x)  # not by a call, which would run hooks

    return _base(forward) if _harmless(module) else None


def base_of_function(function: Callable[..., Any]) -> str | None:
    """As `computed_base`, of a function of one tensor."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(inner, "__code__", None)
    tried = not isinstance(code, CodeType) or _quiet(inner, code)
    return _base(lambda x, training: function(x)) if tried else None


def _base(run: Callable[[Tensor, bool], Any]) -> str | None:
    """The base that `run`, called with numbers and whether in train mode, computes."""
    explicit: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    sizes = torch.logspace(-8.0, 4.0, 49, **explicit)
    x = torch.cat([torch.linspace(-12.0, 12.0, 481, **explicit), sizes, -sizes])
    with torch.no_grad(), random_state_kept(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        try:
            outputs = [_output(run, mode, x, seed) for mode in (False, True) for seed in (0, 1)]
            some = _output(run, False, x[::3].reshape(-1, 1), 0)
        except (MemoryError, OSError):  # says nothing of what it computes
            raise
        except Exception:  # not a function of one tensor
            return None
        y = outputs[0]
        if y is None or some is None or not all(o is not None and torch.equal(o, y) for o in outputs):
            return None
        if not torch.allclose(some.reshape(-1), y[::3], rtol=_RELATIVE, atol=1e-12):
            return None  # not element by element
        bound = _RELATIVE * x.abs()
        return next((b.name for b in BASES.values() if bool(((y - b.activation(x)).abs() <= bound).all())), None)


def _output(run: Callable[[Tensor, bool], Any], training: bool, x: Tensor, seed: int) -> Tensor | None:
    torch.manual_seed(seed)
    y = run(x.clone(), training)
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point() else None


def _harmless(module: nn.Module) -> bool:
    """Whether the module holds constants alone, and its forward sets nothing and says nothing, as far as its code shows."""
    if any(True for _ in chain(module.children(), module.parameters(), module.buffers())):
        return False
    if isinstance(module, torch.jit.ScriptModule):  # its state and code are copied, and cannot be looked into
        return True
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    if not all(_constant(value, module) for value in own.values()):
        return False
    pending = [module.forward, *(value for value in own.values() if callable(value))]
    seen: list[Any] = []
    while pending:
        function = inspect.unwrap(getattr(pending[0], "__func__", pending[0]))
        pending = pending[1:]
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType) and function not in seen:
            seen.append(function)
            if not _quiet(function, code):
                return False
            methods = [getattr(type(module), name, None) for name in code.co_names if not hasattr(nn.Module, name)]
            pending += [method for method in methods if callable(method)]
    return True


def _quiet(function: Any, code: CodeType) -> bool:
    """Whether the code sets nothing outside of itself, holds nothing that it could fill, and has no name of what writes."""
    sets = any(i.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF") for i in dis.get_instructions(code))
    named = [*map(function.__globals__.get, code.co_names), *inspect.getclosurevars(function).nonlocals.values()]
    inner = [value for value in code.co_consts if isinstance(value, CodeType)]
    if sets or _SPEAKS & set(code.co_names) or any(isinstance(value, (list, dict, set)) for value in named):
        return False
    return all(_quiet(function, other) for other in inner)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _constant(value: Any, module: nn.Module) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_constant(item, module) for item in value)
    if isinstance(value, Tensor):
        return value.dim() == 0
    bound = getattr(value, "__self__", None)
    function = callable(value) and (bound is None or bound is module or inspect.ismodule(bound) or isinstance(bound, type))
    return isinstance(value, _CONSTANTS) or (function and not isinstance(value, nn.Module))
