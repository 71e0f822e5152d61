"""Recognises activations that are written as formulas, by their numbers.

At a product x · gate, the gate's argument is recovered from its value, and must be proportional to x: λ is the proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

_SAMPLED_ELEMENTS = 1024  # that are compared
_FEWEST_ELEMENTS = 4  # below, anything is proportional to anything
_FEWEST_TO_SORT = 16
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative: a few roundings
_FP32_TOLERANCE = 2e-4


def sample(x: Tensor) -> Tensor:
    """Elements at fixed places, the same ones in tensors of one shape, in the dtype of `x`."""
    flat = x.detach().reshape(-1)
    if len(flat) <= _SAMPLED_ELEMENTS:
        return flat.clone()
    # a prime step, as a step that divides the features would take them all from one neuron
    return flat[torch.arange(_SAMPLED_ELEMENTS, device=x.device) * 1_000_003 % len(flat)]


def formula(operation: str, argument: Tensor, value: Tensor, x: Tensor, gate: Tensor) -> tuple[str, float | None] | None:
    """(base, λ) if x · gate is an activation c · x · gate(λx) of the family; λ is None where it is 1. None if it is none.

    The gate must be proportional to erf's, tanh's or sigmoid's, and the inverse of its argument to x. [derived] Where the
    argument only grows with x (a SwiGLU with capped factors, mish as a formula), it is "self_gated".
    """
    dtypes = (argument.dtype, value.dtype, x.dtype, gate.dtype)
    tolerance = max(_TOLERANCE.get(dtype, _FP32_TOLERANCE) for dtype in dtypes)
    p, t, x, gate = (tensor.cpu().double() for tensor in (argument, value, x, gate))
    finite = torch.isfinite(p) & torch.isfinite(t) & torch.isfinite(x) & torch.isfinite(gate)
    p, t, x, gate = (tensor[finite] for tensor in (p, t, x, gate))
    bases, wholes = _CANDIDATES[operation]
    scale = next((c for whole in wholes if (c := _proportion(gate, whole(t), tolerance)) is not None), None)
    fits = [] if scale is None else list(_fits(bases, p, x, scale, tolerance))
    for base, hardness in fits:
        if abs(hardness - 1.0) < 0.01:
            return base, None
    if fits:
        return next(((base, hardness) for base, hardness in fits if hardness > 1.0), fits[-1])
    return ("self_gated", None) if operation != "exp" and _rise_together(p, x, tolerance) else None


def _fits(
    bases: Mapping[str, Callable[[Tensor], Tensor]], p: Tensor, x: Tensor, scale: float, tolerance: float
) -> Iterator[tuple[str, float]]:
    """(base, λ) of each base by whose inverse the gate's argument p is proportional to x."""
    for base, inverse in bases.items():
        slope = _proportion(inverse(p), x, tolerance)
        if slope is not None:  # 0.5 * x may come first, so that x here is half of it, or 0.5 may come last
            yield base, slope / scale
            yield base, slope


def _rise_together(p: Tensor, x: Tensor, tolerance: float) -> bool:
    """Whether x is a monotone function of p: a gate of another origin is not, by any chance."""
    if len(x) < _FEWEST_TO_SORT or not bool((x != x[0]).any()) or not bool((p != p[0]).any()):
        return False
    ordered = x[p.argsort()]
    return bool((ordered.cummax(0).values - ordered).max() <= tolerance * x.abs().max())


def _proportion(y: Tensor, x: Tensor, tolerance: float) -> float | None:
    """k > 0 with y = kx, None if there is none or too little to tell it by."""
    if len(x) < _FEWEST_ELEMENTS or not bool((x != x[0]).any()):
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
