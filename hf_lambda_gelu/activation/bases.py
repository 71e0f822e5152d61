"""The four gates of the λ-GELU family.

Every member is f(x; λ) = x · gate(λx) = a(λx) / λ, where a is the activation that the model was pretrained with. Each
gate tends to the Heaviside step, hence f to ReLU, as λ → ∞. The erf member is the paper's (arXiv 2603.21991); the other
three, and all constants but the erf ones, are derived from the same identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_TANH_SCALE = 2.0 * math.sqrt(2.0 / math.pi)  # 0.5 (1 + tanh(p)) = sigmoid(2p)
TANH_CUBIC = 0.044715
QUICK_SCALE = 1.702

# Beyond this |λx| every gate is 0 or 1 to the last bit of float64, so the clamp changes no value; it keeps products such
# as u · slope(u) from being inf · 0.
SATURATION = 1000.0


@dataclass(frozen=True)
class Base:
    """One gate: its functions, its distance to the step, and the names it goes by.

    Attributes:
        name: what users pass as `base`.
        key: the name under which transformers' `ACT2FN` knows the λ-version.
        gate: u → gate(u), elementwise, saturating without overflow.
        slope: u → gate'(u), elementwise, for |u| ≤ `SATURATION`.
        activation: the stock activation a(x) = f(x; 1).
        sup_error: sup over x of |f(x; 1) − ReLU(x)|; at hardness λ it is `sup_error / λ`.
        gate_l1: ∫ |gate(u) − H(u)| du, H the Heaviside step; at hardness λ it is `gate_l1 / λ`.
        stock_keys: the names under which `ACT2FN` knows a. All that the package knows of the family's names, in configs, in
            modelling code and of classes, comes from here.
    """

    name: str
    key: str
    gate: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    sup_error: float
    gate_l1: float
    stock_keys: tuple[str, ...]


def _erf_gate(u: Tensor) -> Tensor:
    return torch.erf(u * math.sqrt(0.5)) * 0.5 + 0.5


def _erf_slope(u: Tensor) -> Tensor:
    return torch.exp(u * u * -0.5) * _INV_SQRT_2PI


def _tanh_argument(u: Tensor) -> Tensor:
    return (u * u * TANH_CUBIC + 1.0) * u * _TANH_SCALE


def _tanh_gate(u: Tensor) -> Tensor:
    # clamped for autograd, since the cube's derivative would be inf · 0; the other gates need no such care
    return torch.sigmoid(_tanh_argument(u.clamp(-SATURATION, SATURATION)))


def _tanh_slope(u: Tensor) -> Tensor:
    gate = _tanh_gate(u)
    return gate * torch.sigmoid(-_tanh_argument(u)) * (u * u * (3 * TANH_CUBIC) + 1.0) * _TANH_SCALE


def _quick_gate(u: Tensor) -> Tensor:
    return torch.sigmoid(u * QUICK_SCALE)


def _quick_slope(u: Tensor) -> Tensor:
    return _quick_gate(u) * _quick_gate(-u) * QUICK_SCALE


def _silu_slope(u: Tensor) -> Tensor:
    return torch.sigmoid(u) * torch.sigmoid(-u)


# The suprema and integrals are checked against mpmath in tests/activation/test_bases.py.
BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            "gelu",
            "lambda_gelu",
            _erf_gate,
            _erf_slope,
            F.gelu,
            0.16997120747990369,
            0.79788456080286536,
            ("gelu", "gelu_python"),
        ),
        Base(
            "gelu_tanh",
            "lambda_gelu_tanh",
            _tanh_gate,
            _tanh_slope,
            lambda x: F.gelu(x, approximate="tanh"),
            0.17004075057125405,
            0.79778089557430851,
            ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        ),
        Base(
            "quick_gelu",
            "lambda_quick_gelu",
            _quick_gate,
            _quick_slope,
            lambda x: x * torch.sigmoid(QUICK_SCALE * x),
            0.27846454276107379 / QUICK_SCALE,
            2.0 * math.log(2.0) / QUICK_SCALE,
            ("quick_gelu",),
        ),
        Base(
            "silu",
            "lambda_silu",
            torch.sigmoid,
            _silu_slope,
            F.silu,
            0.27846454276107379,
            2.0 * math.log(2.0),
            ("silu", "swish"),
        ),
    )
}


def get_base(name: str) -> Base:
    """The base called `name`.

    Raises:
        ValueError: `name` is none of the four.
    """
    try:
        return BASES[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown base {name!r}: expected one of {', '.join(map(repr, BASES))}") from None
