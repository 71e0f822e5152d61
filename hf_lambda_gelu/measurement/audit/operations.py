"""Sees every operation of a forward pass, and which module runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..._compat import OpOverload, TorchDispatchMode, operator_schema, view_base
from ...activation.module import LambdaGELU
from .formulas import formula, sample
from .kinds import BETWEEN, GATES, MAKES_ZEROS, kind_of


@dataclass
class Event:
    """One activation that ran; a gate's kind changes when it turns out to be part of a formula, "" is none."""

    name: str
    kind: str
    hardness: float | None = None
    base: str | None = None
    zeros: int | None = None
    size: int = 0


@dataclass
class Tag:
    """On a tensor: the event that it comes from; of a gate, samples of its argument and value, else none."""

    event: Event
    operation: str
    shape: torch.Size
    argument: Tensor | None = None
    value: Tensor | None = None


class OperationTrace(TorchDispatchMode):
    """Sees every operation and which module runs it."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.stack: list[tuple[str, nn.Module]] = [("", model)]
        self.events: list[Event] = []
        self.reached: set[nn.Module] = set()
        self.opaque: dict[str, None] = {}
        self.tags = WeakTensorKeyDictionary()

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(self._enter).remove)
                hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: object) -> None:
        # a shared module goes by its name in the module that calls it
        inside, names = self.stack[-1][0], self.names[module]
        name = next((n for n in names if n.startswith(f"{inside}.")), names[0])
        self.stack.append((name, module))
        self.reached.add(module)
        if (site := self._soft_site()) is not None:
            self.events.append(Event(name, "lambda_gelu", float(site.hardness), site.base))

    def _leave(self, module: nn.Module, *_: object) -> None:
        if self.stack[-1][1] is module:
            self.stack.pop()

    def _soft_site(self) -> LambdaGELU | None:
        """The λ-GELU that is running, if one is."""
        module = self.stack[-1][1]
        return module if isinstance(module, LambdaGELU) and not module.as_relu else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._soft_site() is not None:
            return func(*args, **kwargs)
        library, _, operation = (
            operator_schema(func).name.partition("::") if isinstance(func, OpOverload) else (str(func), "", "")
        )
        if func is torch.ops.hf_lambda_gelu.forward.default:  # `lambda_gelu` as a function
            _, hardness, base = args
            self.events.append(Event(self.stack[-1][0], "lambda_gelu", float(hardness.min()), base))  # of many, the softest
            return func(*args, **kwargs)
        if library not in ("aten", "prim", "prims"):
            self.opaque[f"{library}::{operation}" if operation else library] = None
            return func(*args, **kwargs)
        operation = operation.rstrip("_")  # in place
        # what must be known before it runs, as it may write over its arguments
        kind = argument = None
        if args and _is_activation_input(args[0]):
            kind = kind_of(operation, func, args, kwargs)
            argument = sample(args[0]) if operation in GATES else None
        if operation in ("mul", "div"):
            self._product(operation, args[0], args[1])
        elif operation == "pow":
            self._power(args[0], args[1])
        carried = self._carried(args) if operation in BETWEEN else None
        result = func(*args, **kwargs)
        out = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(out, Tensor):
            tag = self._record(operation, kind, argument, out) or carried
            if tag is not None and tag.shape == out.shape:
                self.tags[out] = tag
            elif out in self.tags:  # written over
                del self.tags[out]
        return result

    def _record(self, operation: str, kind: str | None, argument: Tensor | None, out: Tensor) -> Tag | None:
        name = self.stack[-1][0]
        if kind is not None:
            event = Event(name, kind)
            if kind in MAKES_ZEROS:
                event.zeros, event.size = int((out == 0).sum()), out.numel()
            self.events.append(event)
            return Tag(event, operation, out.shape) if kind == "relu" else None
        if argument is None:
            return None
        self.events.append(Event(name, "" if operation == "exp" else operation))
        return Tag(self.events[-1], operation, out.shape, argument, sample(out))

    def _tag(self, value: object) -> Tag | None:
        found: Tag | None = self.tags.get(value) if isinstance(value, Tensor) else None
        return found

    def _carried(self, args: tuple[Any, ...]) -> Tag | None:
        """The tag of the one argument that has one, if the others are numbers."""
        tags = [tag for arg in args if (tag := self._tag(arg)) is not None]
        numbers = all(arg.numel() == 1 or self._tag(arg) is not None for arg in args if isinstance(arg, Tensor))
        return tags[0] if len(tags) == 1 and numbers and tags[0].value is not None else None

    def _product(self, operation: str, first: object, second: object) -> None:
        """`first` times or divided by `second`: is one of them a gate of the other?"""
        if first is second:
            self._power(first, 2)
        for gate, x in ((second, first), (first, second))[: 1 if operation == "div" else 2]:
            tag = self._tag(gate)
            if tag is None or tag.argument is None or tag.value is None or not isinstance(x, Tensor) or x.numel() == 1:
                continue
            found = None
            if isinstance(gate, Tensor) and gate.shape == x.shape == tag.shape:
                values = sample(gate)
                values = values.reciprocal() if operation == "div" else values
                found = formula(tag.operation, tag.argument, tag.value, sample(x), values)
            if found is not None:  # the formula is the work of the module that multiplies
                tag.event.kind, tag.event.hardness = found
                tag.event.name = self.stack[-1][0]
                return
            if tag.event.kind == "sigmoid" and operation == "mul":
                tag.event.kind = "sigmoid gate"

    def _power(self, x: object, exponent: object) -> None:
        """Is it the square of a ReLU? By its module or one around it, as a normalisation after it squares too."""
        tag, name = self._tag(x), self.stack[-1][0]
        if tag is None or tag.event.kind != "relu" or exponent != 2:
            return
        if not name or f"{tag.event.name}.".startswith(f"{name}."):
            tag.event.kind = "relu2"


def _is_activation_input(x: object) -> bool:
    # a function of a parameter is a parametrisation
    return (
        isinstance(x, Tensor) and x.is_floating_point() and not any(isinstance(t, nn.Parameter) for t in (x, view_base(x)))
    )
