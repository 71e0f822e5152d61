"""Tells which activations a model really runs, by watching the operations of a forward pass.

Class and attribute names say what the author meant. Here only torch's operations count, and a GELU that is written as a
formula is known by its numbers: of x · gate, the argument of the erf, tanh or sigmoid is compared with x.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.activations import LinearActivation

from .activation import LambdaGELU
from .batches import FORWARD_ERRORS, example_inputs
from .calibration import measuring
from .discovery import is_activation, probed_base
from .inventory import calls_in_class

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

_PIECEWISE = {"relu", "leaky_relu", "prelu", "relu6", "hardtanh", "threshold"}
_OTHER = {"tanh", "sigmoid", "sigmoid gate", "hardsigmoid", "log_sigmoid", "erf", "erfc", "lstm", "gru"}
_ZEROS = {"relu", "relu6", "threshold"}
_NO_ACTIVATION = (nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax, LinearActivation)

_SAMPLES = 1024  # elements that are compared
_FEWEST = 4  # below, anything is proportional to anything
_FEWEST_TO_SORT = 16
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # a few roundings
_FP32_TOLERANCE = 2e-4


@dataclass(frozen=True)
class AuditEntry:
    """What one module ran, its children apart.

    Attributes:
        name: of the innermost module that was running, "" for the model itself.
        kind: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "lambda_gelu", "tanh", "sigmoid gate" …
        calls: how many times in the pass.
        hardness: λ of a λ-GELU, and of a formula such as x · sigmoid(kx).
        base: of a λ-GELU.
        zeros: fraction of the output that is 0, of the kinds that make zeros.
    """

    name: str
    kind: str
    calls: int
    hardness: float | None = None
    base: str | None = None
    zeros: float | None = None

    @property
    def group(self) -> str:
        """ "piecewise": piecewise linear; "other": bounded or a gate; "smooth": all else, ReLU² and hardswish too."""
        return "piecewise" if self.kind in _PIECEWISE else "other" if self.kind in _OTHER else "smooth"


@dataclass(frozen=True)
class AuditReport:
    """What `audit` saw. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        model: name of the model's class.
        entries: in the order of their first call.
        unreached: (module name, what) of activations that the pass did not come to, so that it says nothing about them.
        opaque: operations that are not torch's own: what they do inside is not seen.
    """

    model: str
    entries: tuple[AuditEntry, ...]
    unreached: tuple[tuple[str, str], ...] = ()
    opaque: tuple[str, ...] = ()

    @property
    def smooth(self) -> list[AuditEntry]:
        """The entries that are not piecewise linear, bounded ones and gates apart."""
        return [entry for entry in self.entries if entry.group == "smooth"]

    @property
    def counts(self) -> dict[str, int]:
        """{kind: number of modules}."""
        return dict(Counter(entry.kind for entry in self.entries))

    @property
    def is_relu(self) -> bool:
        """Nothing smooth ran, and at least one ReLU did. See `unreached` for what did not run."""
        return not self.smooth and "relu" in self.counts

    def to_dict(self) -> dict[str, Any]:
        entries = [asdict(entry) | {"group": entry.group} for entry in self.entries]
        return asdict(self) | {"entries": entries, "counts": self.counts, "is_relu": self.is_relu}

    def __str__(self) -> str:
        rows: dict[tuple[str, str, str], list[AuditEntry]] = {}
        for entry in self.entries:  # the layers of a network in one row
            label = entry.kind if entry.base is None else f"{entry.kind} ({entry.base})"
            rows.setdefault((label, entry.group, _pattern(entry.name)), []).append(entry)
        smooth = len(self.smooth)
        verdict = "a ReLU network" if self.is_relu else f"{smooth} smooth" if smooth else "no ReLU, nothing smooth"
        lines = [f"{self.model} runs {len(self.entries)} activations: {verdict}"]
        width = max((len(label) for label, _, _ in rows), default=0)
        for (label, group, pattern), entries in rows.items():
            text = f"  {label:<{width}}  {group:<9}  {len(entries):>3} × {pattern}, {sum(e.calls for e in entries)} calls"
            for name, form in (("hardness", "λ {}"), ("zeros", "{} zeros")):
                values = [value for e in entries if (value := getattr(e, name)) is not None]
                if values:
                    shown = [f"{v:.0%}" if name == "zeros" else f"{v:.4g}" for v in (min(values), max(values))]
                    text += ", " + form.format(" to ".join(dict.fromkeys(shown)))
            lines.append(text)
        if self.unreached:
            lines.append(f"{len(self.unreached)} not reached by this pass, which says nothing about them")
            missed = Counter((_pattern(name), what) for name, what in self.unreached)
            lines += [f"  {count:>3} × {pattern}: {what}" for (pattern, what), count in missed.items()]
        if self.opaque:
            lines.append(f"not seen into: {', '.join(self.opaque)}")
        return "\n".join(lines)


def audit(model_or_path: nn.Module | str | os.PathLike[str], inputs: Any = None) -> AuditReport:
    """Run the model once and tell which activations ran, whatever the modules and the config are called.

    Softmax, normalisation and rotary embeddings are no activations; neither is a function of parameters alone. What is seen
    are torch's operations: kernels that go past them (a compiled extension) are not.

    Args:
        model_or_path: any module, or the folder of a checkpoint, loaded on the CPU by the class in its config. Run in
            eval mode without gradients; modes, hooks and random state are afterwards as they were.
        inputs: a mapping of forward's arguments, or a tensor or tuple for positional ones; for a transformers model by
            default a small batch made to fit it. Only what they reach is audited: see `unreached`.

    Raises:
        TypeError: neither a module nor a path; inputs of another type.
        ValueError: a folder without a model, a model on meta or compiled, no inputs and none to be guessed, or a
            forward that raises.
    """
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
    elif isinstance(model_or_path, (str, os.PathLike)):
        with _random_state_kept(None):
            model = _load(os.fspath(model_or_path))
    else:
        raise TypeError(f"audit expects a module or the folder of a checkpoint, got {type(model_or_path).__name__}")
    _check_runnable(model)
    args, kwargs = _arguments(model, inputs)
    trace = _Trace(model)
    with _random_state_kept(model), measuring(model), torch.no_grad():
        try:
            with trace.watching(model), trace:
                model(*args, **kwargs)
        except FORWARD_ERRORS as error:
            raise ValueError(
                f"{type(model).__name__}.forward raised {type(error).__name__}: {error}. Pass inputs=… that it takes"
            ) from error
        unreached = tuple(_unreached(model, trace.reached))
    return AuditReport(type(model).__name__, tuple(trace.entries()), unreached, tuple(trace.opaque))


@dataclass
class _Event:
    """One activation that ran; a gate's kind changes when it turns out to be part of a formula, "" is none."""

    name: str
    kind: str
    hardness: float | None = None
    base: str | None = None
    zeros: int | None = None
    size: int = 0


@dataclass
class _Tag:
    """On a tensor: the event that it comes from; of a gate, samples of its argument and value, else none."""

    event: _Event
    operation: str
    shape: torch.Size
    argument: Tensor | None = None
    value: Tensor | None = None


class _Trace(TorchDispatchMode):
    """Sees every operation and which module runs it."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.stack: list[tuple[str, nn.Module]] = [("", model)]
        self.events: list[_Event] = []
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

    def entries(self) -> Iterator[AuditEntry]:
        groups: dict[tuple[str, str], list[_Event]] = {}
        for event in self.events:
            if event.kind:
                groups.setdefault((event.name, event.kind), []).append(event)
        for (name, kind), events in groups.items():
            size = sum(event.size for event in events)
            zeros = sum(event.zeros for event in events) / size if size else None
            yield AuditEntry(name, kind, len(events), events[0].hardness, events[0].base, zeros)

    def _enter(self, module: nn.Module, args: object) -> None:
        # a shared module goes by its name in the module that calls it
        inside, names = self.stack[-1][0], self.names[module]
        name = next((n for n in names if n.startswith(f"{inside}.")), names[0])
        self.stack.append((name, module))
        self.reached.add(module)
        if self._inside_lambda_gelu():
            self.events.append(_Event(name, "lambda_gelu", float(module.hardness), module.base))

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
        if library not in ("aten", "prim", "prims"):
            self.opaque[f"{library}::{operation}" if operation else library] = None
            return func(*args, **kwargs)
        operation = operation.rstrip("_")  # in place
        # what must be known before it runs, as it may write over its arguments
        kind = argument = None
        if args and _is_activation_input(args[0]):
            kind = _direct_kind(operation, func, args, kwargs)
            argument = _sample(args[0]) if operation in _GATES else None
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

    def _record(self, operation: str, kind: str | None, argument: Tensor | None, out: Tensor) -> _Tag | None:
        name = self.stack[-1][0]
        if kind is not None:
            event = _Event(name, kind)
            if kind in _ZEROS:
                event.zeros, event.size = int((out == 0).sum()), out.numel()
            self.events.append(event)
            return _Tag(event, operation, out.shape) if kind == "relu" else None
        if argument is None:
            return None
        self.events.append(_Event(name, "" if operation == "exp" else operation))
        return _Tag(self.events[-1], operation, out.shape, argument, _sample(out))

    def _tag(self, value: object) -> _Tag | None:
        return self.tags.get(value) if isinstance(value, Tensor) else None

    def _carried(self, args: tuple[Any, ...]) -> _Tag | None:
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
                values = _sample(gate)
                found = _formula(tag, _sample(x), values.reciprocal() if operation == "div" else values)
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


def _sample(x: Tensor) -> Tensor:
    """Elements at fixed places, the same ones in tensors of one shape, in the dtype of `x`."""
    flat = x.detach().reshape(-1)
    if len(flat) <= _SAMPLES:
        return flat.clone()
    # a prime step, as a step that divides the features would take them all from one neuron
    return flat[torch.arange(_SAMPLES, device=x.device) * 1_000_003 % len(flat)]


def _formula(tag: _Tag, x: Tensor, gate: Tensor) -> tuple[str, float | None] | None:
    """(base, λ) if x · gate is an activation c · x · gate(λx) of the family; λ is None where it is 1. None if it is none.

    The gate must be proportional to erf's, tanh's or sigmoid's, and the inverse of its argument to x. [derived] Where the
    argument only grows with x (a SwiGLU with capped factors, mish as a formula), it is "self_gated".
    """
    dtypes = (tag.argument.dtype, tag.value.dtype, x.dtype, gate.dtype)
    tolerance = max(_TOLERANCE.get(dtype, _FP32_TOLERANCE) for dtype in dtypes)
    p, t, x, gate = (tensor.cpu().double() for tensor in (tag.argument, tag.value, x, gate))
    finite = torch.isfinite(p) & torch.isfinite(t) & torch.isfinite(x) & torch.isfinite(gate)
    p, t, x, gate = (tensor[finite] for tensor in (p, t, x, gate))
    bases, wholes = _CANDIDATES[tag.operation]
    scale = next((c for whole in wholes if (c := _proportion(gate, whole(t), tolerance)) is not None), None)
    fits: list[tuple[str, float]] = []
    for base, inverse in bases.items() if scale is not None else ():
        slope = _proportion(inverse(p), x, tolerance)
        # 0.5 * x may come first, so that x here is half of it, or 0.5 may come last
        fits += [] if slope is None else [(base, slope / scale), (base, slope)]
    for base, hardness in fits:
        if abs(hardness - 1.0) < 0.01:
            return base, None
    if fits:
        return next(((base, hardness) for base, hardness in fits if hardness > 1.0), fits[-1])
    return ("self_gated", None) if tag.operation != "exp" and _rise_together(p, x, tolerance) else None


def _rise_together(p: Tensor, x: Tensor, tolerance: float) -> bool:
    """Whether x is a monotone function of p: a gate of another origin is not, by any chance."""
    if len(x) < _FEWEST_TO_SORT or not bool((x != x[0]).any()) or not bool((p != p[0]).any()):
        return False
    ordered = x[p.argsort()]
    return bool((ordered.cummax(0).values - ordered).max() <= tolerance * x.abs().max())


def _proportion(y: Tensor, x: Tensor, tolerance: float) -> float | None:
    """k > 0 with y = kx, None if there is none or too little to tell it by."""
    if len(x) < _FEWEST or not bool((x != x[0]).any()):
        return None
    factor = float(y @ x) / float(x @ x)
    good = factor > 0.0 and float((y - factor * x).norm()) <= tolerance * float(y.norm())
    return factor if good else None


def _uncubed(q: Tensor) -> Tensor:
    """u of q = 2√(2/π) (u + 0.044715 u³), by Cardano's formula in its hyperbolic form."""
    c = 0.044715
    p = q / (2.0 * math.sqrt(2.0 / math.pi))
    return 2.0 / math.sqrt(3.0 * c) * torch.sinh(torch.asinh(1.5 * math.sqrt(3.0 * c) * p) / 3.0)


# gate → {base: argument of the gate → λx}, and the forms in which its value t may be multiplied, as gate in [0, 1]; half of
# t alone is for 0.5 * x + 0.5 * x * t
_CANDIDATES: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], tuple[Callable[[Tensor], Tensor], ...]]] = {
    "erf": ({"gelu": lambda p: p * math.sqrt(2.0)}, (lambda t: 0.5 + 0.5 * t, lambda t: 0.5 * t)),
    "erfc": ({"gelu": lambda p: p * -math.sqrt(2.0)}, (lambda t: 0.5 * t,)),
    "tanh": (
        {"gelu_tanh": lambda p: _uncubed(2.0 * p), "silu": lambda p: 2.0 * p, "quick_gelu": lambda p: 2.0 * p / 1.702},
        (lambda t: 0.5 + 0.5 * t,),
    ),
    "sigmoid": ({"silu": lambda p: p, "quick_gelu": lambda p: p / 1.702, "gelu_tanh": _uncubed}, (lambda t: t,)),
    "exp": (
        {"silu": lambda p: -p, "quick_gelu": lambda p: -p / 1.702, "gelu_tanh": lambda p: _uncubed(-p)},
        (lambda t: 1.0 / (1.0 + t),),
    ),
}


def _load(folder: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], AutoModel)
        return cls.from_pretrained(folder, config=config, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"no model could be loaded from {folder!r}: {error}. Expected a folder with config.json and weights, as "
            "save_pretrained writes it"
        ) from error


def _check_runnable(model: nn.Module) -> None:
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model is on the meta device, where nothing can be computed: load its weights first")
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ValueError("the model is compiled, which hides its operations: pass the one before torch.compile (._orig_mod)")


def _arguments(model: nn.Module, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments for forward, on the model's device; copies, as a model may write into its input."""
    if inputs is None and isinstance(model, PreTrainedModel):
        try:
            inputs = example_inputs(model)
        except FORWARD_ERRORS as error:
            raise ValueError(f"no inputs can be guessed for {type(model).__name__}: {error}. Pass inputs=…") from error
    if inputs is None:
        raise ValueError(f"{type(model).__name__} is no transformers model: pass inputs=…, what its forward takes")
    tensor = next(model.parameters(), next(model.buffers(), None))

    def placed(value: Any) -> Any:
        return (
            value.detach().clone().to(value.device if tensor is None else tensor.device)
            if isinstance(value, Tensor)
            else value
        )

    if isinstance(inputs, Mapping):
        return [], {name: placed(value) for name, value in inputs.items()}
    if isinstance(inputs, (Tensor, tuple, list)):
        return [placed(value) for value in ([inputs] if isinstance(inputs, Tensor) else inputs)], {}
    raise TypeError(f"inputs is a {type(inputs).__name__}: expected a mapping of forward's arguments, a tensor or a tuple")


def _unreached(model: nn.Module, reached: set[nn.Module]) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if module in reached or isinstance(module, _NO_ACTIVATION):
            continue
        if is_activation(module) or probed_base(module) is not None:
            yield name, type(module).__name__
        else:  # an expert whose forward calls F.gelu
            yield from ((name, call) for call in calls_in_class(type(module)))


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name) or "the model itself"


@contextlib.contextmanager
def _random_state_kept(model: nn.Module | None) -> Iterator[None]:
    devices = {p.device.index for p in model.parameters() if p.is_cuda} if model is not None else set()
    state, numbers = random.getstate(), np.random.get_state()  # BigBird seeds NumPy in its forward
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
