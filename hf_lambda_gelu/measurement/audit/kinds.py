"""The kinds of activation that the audit tells apart, and torch's operations that are one by themselves: all in tables."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..._compat import OpOverload, operator_schema

Group = Literal["piecewise", "other", "smooth"]

# Kinds that no table names (the GELU family, ReLU², hardswish, softplus) are smooth.
_GROUPS: dict[str, Group] = {
    "relu": "piecewise",
    "relu6": "piecewise",
    "threshold": "piecewise",
    "leaky_relu": "piecewise",
    "prelu": "piecewise",
    "hardtanh": "piecewise",
    "tanh": "other",
    "sigmoid": "other",
    "sigmoid gate": "other",
    "hardsigmoid": "other",
    "log_sigmoid": "other",
    "erf": "other",
    "erfc": "other",
    "lstm": "other",
    "gru": "other",
}
MAKES_ZEROS = {"relu", "relu6", "threshold"}

# Operation → kind, of those that are an activation whatever their arguments; the others are in `kind_of`.
_OPERATIONS = {
    "silu": "silu",
    "mish": "mish",
    "softplus": "softplus",
    "celu": "celu",
    "hardswish": "hardswish",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "rrelu_with_noise": "leaky_relu",  # in eval mode
    "_prelu_kernel": "prelu",
    "hardsigmoid": "hardsigmoid",
    "log_sigmoid_forward": "log_sigmoid",
    "glu": "sigmoid gate",
    "expm1": "expm1",  # the smooth half of an ELU or xIELU that is written as a formula
    "_thnn_fused_lstm_cell": "lstm",
    "_thnn_fused_gru_cell": "gru",
}
_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")  # one operation for a whole layer
_RECURRENT_MODES = ("relu", "tanh", "lstm", "gru")  # by the number of their argument `mode`
_BY_ARGUMENTS = {"gelu", "elu", "threshold", "maximum", "hardtanh", "clamp", "clamp_min", *_RECURRENT}

GATES = ("erf", "erfc", "tanh", "sigmoid", "exp")  # may be part of a formula
# What may stand between a gate and the product with x: arithmetic, copies and views.
BETWEEN = {"add", "sub", "rsub", "mul", "div", "reciprocal", "neg"}
BETWEEN |= {"_to_copy", "clone", "detach", "alias", "view", "_unsafe_view"}


def group_of(kind: str) -> Group:
    """ "piecewise": piecewise linear; "other": bounded or a gate; "smooth": all else."""
    return _GROUPS.get(kind, "smooth")


def kind_of(operation: str, func: OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The activation that this operation is, None if it is none by itself."""
    if operation not in _BY_ARGUMENTS:
        return _OPERATIONS.get(operation)
    schema = operator_schema(func).arguments
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
        mode: Any = values["mode"]
        return _RECURRENT_MODES[mode]
    bounds = ("min_val", "max_val") if operation == "hardtanh" else ("min", "max")
    low, high = (_number(values.get(name)) for name in bounds)
    if low == 0.0 and high in (None, 6.0):
        return "relu" if high is None else "relu6"
    return "hardtanh" if operation == "hardtanh" else None  # other clamps are guards against overflow


def _number(value: Any) -> float | None:
    """None of a tensor with more than one element too."""
    return None if value is None or (isinstance(value, Tensor) and value.numel() != 1) else float(value)
