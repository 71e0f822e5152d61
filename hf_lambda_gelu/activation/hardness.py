"""The number λ: what older checkpoints hold, the λ that a tolerance asks for, and how far from ReLU a gate of that λ is."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from .bases import get_base

MAX_HARDNESS = 1e30  # far beyond any use, and λx stays a number in fp32 for any moderate x
DEFAULT_TOLERANCE = 0.005  # ε, of the gate
DEFAULT_RELATIVE_TOLERANCE = 0.01  # τ, the error of a site relative to its output


def hardness_from_raw(raw: Tensor) -> Tensor:
    """λ = 1 + softplus(s / t), elementwise, for the s that release 0.1 kept in checkpoints, at their t = 0.1."""
    return 1.0 + F.softplus(raw.float() / 0.1)


def check_hardness(value: float) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is below 1, above 1e30, or NaN.
        TypeError: it is no number.
    """
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        value = float(value)
    except (TypeError, ValueError, RuntimeError):  # the last two: arrays and tensors of several elements
        raise TypeError(
            f"hardness must be a number, or in lambda_gelu a tensor, got {type(value).__name__}: {value!r}"
        ) from None
    if math.isnan(value):
        raise ValueError("hardness must be a finite number >= 1, got nan: it comes from a run that has diverged")
    if not (1.0 <= value <= MAX_HARDNESS):
        raise ValueError(
            f"hardness must be a finite number >= 1 (1 is the smooth activation itself) and <= 1e30, got {value}; "
            "for ReLU itself, use relu_ize"
        )
    return value


def target_hardness(tolerance: float = DEFAULT_TOLERANCE, base: str = "gelu") -> float:
    """The λ at which the gate's ℓ1 distance to the Heaviside step is ε, `tolerance`: 2 / (ε√(2π)) for the erf base.

    Formula: ∫ |gate(λx) − H(x)| dx = gate_l1 / λ, solved for λ. Source: derived.
    ε = 0.005 gives 159.58, the paper's "≈ 160" (the bound is reported in a review of arXiv 2603.21991, the ε is inferred).

    Args:
        tolerance: ε > 0, in units of the gate's argument. An ε that would put λ below 1 gives 1.
        base: as in `lambda_gelu`.

    Returns:
        λ ≥ 1, dimensionless.

    Raises:
        ValueError: ε is not a finite number > 0, or the base is unknown.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> round(hlg.target_hardness(0.005), 2)
        159.58
    """
    if not (0.0 < tolerance < math.inf):
        raise ValueError(f"hardness tolerance must be a finite number > 0 (0.005 gives λ = 159.58), got {tolerance}")
    return max(1.0, get_base(base).gate_l1 / tolerance)


def check_relative_tolerance(tolerance: float) -> None:
    """Raises ValueError unless τ, the error of a site relative to its output, is a finite number > 0."""
    if not (0.0 < tolerance < math.inf):
        raise ValueError(f"the relative tolerance must be a finite number > 0 (0.01 is 1 %), got {tolerance}")


def sup_error(hardness: float, base: str = "gelu") -> float:
    """The largest distance of λ-GELU to ReLU, sup over x of |f(x; λ) − ReLU(x)|: 0.16997 / λ for the erf base.

    Formula: f(x; λ) = f(λx; 1) / λ and ReLU(x) = ReLU(λx) / λ, so the supremum at λ is that at 1, over λ. Source: derived.

    Args:
        hardness: λ > 0, dimensionless. Not checked.
        base: as in `lambda_gelu`.

    Returns:
        The distance, in the units of x.

    Raises:
        ValueError: unknown base.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> round(hlg.sup_error(160.0), 5)
        0.00106
    """
    return get_base(base).sup_error / hardness
