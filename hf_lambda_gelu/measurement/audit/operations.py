"""Sees every operation of a forward pass, and which module runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ...activation.module import LambdaGELU
from .formulas import formula, sample

# Operations that are activations as they are; those whose arguments decide are in _BY_ARGUMENTS.
_OPERATIONS = {
    **{name: name for name in ("silu", "mish", "softplus", "celu", "hardswish", "relu", "leaky_relu", "hardsigmoid")},
    "glu": "sigmoid gate",
    "_prelu_kernel": "prelu",
    "rrelu_with_noise": "leaky_relu",  # in eval mode
    "log_sigmoid_forward": "log_sigmoid",
    "expm1": "expm1",  # the smooth half of an ELU or xIELU that is written as a formula
    "_thnn_fused_lstm_cell": "lstm",
    "_thnn_fused_gru_cell": "gru",
}
_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")  # one operation for a whole layer
_BY_ARGUMENTS = {"gelu", "elu", "threshold", "maximum", "hardtanh", "clamp", "clamp_min", *_RECURRENT}
_GATES = ("erf", "erfc", "tanh", "sigmoid", "exp")  # may be part of a formula
# what may stand between a gate and the product with x
_STEPS = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "reciprocal",
    "neg",
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "view",
    "_unsafe_view",
)

_ZEROS = {"relu", "relu6", "threshold"}  # kinds that make zeros


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
        super().__init__()
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
        if self._inside_lambda_gelu():
            self.events.append(Event(name, "lambda_gelu", float(module.hardness), module.base))

    def _leave(self, module: nn.Module, *_: object) -> None:
        if self.stack[-1][1] is module:
            self.stack.pop()

    def _inside_lambda_gelu(self) -> bool:
        module = self.stack[-1][1]
        return isinstance(module, LambdaGELU) and not module.as_relu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside_lambda_gelu():
            return func(*args, **kwargs)
        library, _, operation = func._schema.name.partition("::") if isinstance(func, OpOverload) else (str(func), "", "")
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
            kind = _direct_kind(operation, func, args, kwargs)
            argument = sample(args[0]) if operation in _GATES else None
        if operation in ("mul", "div"):
            self._product(operation, args[0], args[1])
        elif operation == "pow":
            self._power(args[0], args[1])
        carried = self._carried(args) if operation in _STEPS else None
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
            if kind in _ZEROS:
                event.zeros, event.size = int((out == 0).sum()), out.numel()
            self.events.append(event)
            return Tag(event, operation, out.shape) if kind == "relu" else None
        if argument is None:
            return None
        self.events.append(Event(name, "" if operation == "exp" else operation))
        return Tag(self.events[-1], operation, out.shape, argument, sample(out))

    def _tag(self, value: object) -> Tag | None:
        return self.tags.get(value) if isinstance(value, Tensor) else None

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
            if tag is None or tag.value is None or not isinstance(x, Tensor) or x.numel() == 1:
                continue
            found = None
            if gate.shape == x.shape == tag.shape:
                values = sample(gate)
                found = formula(
                    tag.operation, tag.argument, tag.value, sample(x), values.reciprocal() if operation == "div" else values
                )
            if found is not None:  # the formula is the work of the module that multiplies
                tag.event.kind, tag.event.hardness = found
                tag.event.name = self.stack[-1][0]
                return
            if tag.event.kind == "sigmoid" and operation == "mul":
                tag.event.kind = "sigmoid gate"

    def _power(self, x: object, exponent: object) -> None:
        """Is it the square of a ReLU? By its module or one around it, as a normalisation after it squares too."""
        tag, name = self._tag(x), self.stack[-1][0]
        inside = tag is not None and (not name or f"{tag.event.name}.".startswith(f"{name}."))
        if inside and tag.event.kind == "relu" and exponent == 2:
            tag.event.kind = "relu2"


def _is_activation_input(x: object) -> bool:
    # a function of a parameter is a parametrisation
    return isinstance(x, Tensor) and x.is_floating_point() and not any(isinstance(t, nn.Parameter) for t in (x, x._base))


def _direct_kind(operation: str, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The activation that this operation is, None if it is none by itself."""
    if operation not in _BY_ARGUMENTS:
        return _OPERATIONS.get(operation)
    schema = func._schema.arguments
    values = {a.name: a.default_value for a in schema} | dict(zip([a.name for a in schema], args, strict=False)) | kwargs
    if operation == "gelu":
        return "gelu_tanh" if values["approximate"] == "tanh" else "gelu"
    if operation == "elu":
        return "elu" if values["scale"] == 1 else "selu"
    if operation == "threshold":
        return "relu" if values["threshold"] == values["value"] == 0 else "threshold"
    if operation == "maximum":
        return "relu" if any(t.numel() == 1 and _number(t) == 0.0 for t in args) else None
    if operation in _RECURRENT:
        return ("relu", "tanh", "lstm", "gru")[values["mode"]]
    low, high = (
        _number(values.get(name)) for name in (("min_val", "max_val") if operation == "hardtanh" else ("min", "max"))
    )
    if low == 0.0 and high in (None, 6.0):
        return "relu" if high is None else "relu6"
    return "hardtanh" if operation == "hardtanh" else None  # other clamps are guards against overflow


def _number(value: Any) -> float | None:
    """None of a tensor with more than one element too."""
    return None if value is None or (isinstance(value, Tensor) and value.numel() != 1) else float(value)
