"""`lambda_gelu` as a function, and the plain formula that it is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .._compat import transformed
from .bases import get_base
from .hardness import check_hardness
from .kernels.dispatch import LambdaGELUFunction
from .kernels.eager import value

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lambda_gelu(x: Tensor, hardness: Tensor | float, base: str = "gelu") -> Tensor:
    r"""λ-GELU: f(x; λ) = x · gate(λx) = a(λx) / λ, in the form that cannot overflow.

    λ = 1 is the stock activation a, λ → ∞ is ReLU. |f − ReLU| ≤ 0.16997 / λ for the erf base.
    Source: arXiv 2603.21991 for `base="gelu"` (f = x Φ(λx)); the other bases are derived.

    Args:
        x: dense, fp32, bf16, fp16 or fp64, any shape. Half precision is computed in fp32 and returned in half; NaN stays
            NaN.
        hardness: λ ≥ 1, dimensionless; a number, or a tensor of these dtypes on x's device that broadcasts to `x` (shape
            (1,) for one per layer, (features,) for one per neuron).
            The values of tensors are not checked, as that would wait for
            the device: λ = NaN gives NaN, λ = inf is ReLU.
        base: "gelu" (erf), "gelu_tanh" (`gelu_new`, `gelu_pytorch_tanh`), "quick_gelu" or "silu" (λ is Swish's β).

    Returns:
        Same shape and dtype as `x`, laid out as `x`; differentiable in x and λ, twice, and forwards. Under torch.func (grad,
        vmap, jvp …), forward-mode AD, torch.jit.trace and in a compiler torch's own operations run, elsewhere the kernel
        that `set_kernels` tells of. torch.fx traces it as one function.

    Raises:
        ValueError: unknown base, a number λ that is below 1 or not finite, or a tensor λ that does not broadcast to `x` or
            is on another device.
        TypeError: `x` or λ is of another dtype (integer, complex, float8, quantised), sparse or nested.

    Examples:
        >>> import torch
        >>> import hf_lambda_gelu as hlg
        >>> x = torch.tensor([-1.0, 1.0])
        >>> [round(y, 4) for y in hlg.lambda_gelu(x, 1.0).tolist()]  # GELU itself
        [-0.1587, 0.8413]
        >>> [round(y, 4) for y in hlg.lambda_gelu(x, 160.0).tolist()]  # ReLU, nearly
        [-0.0, 1.0]
    """
    member = get_base(base)
    if not _dense(x):
        if not isinstance(x, Tensor) and has_torch_function((x,)):  # torch.fx's
            return handle_torch_function(lambda_gelu, (x,), x, hardness, base)
        raise TypeError(f"lambda_gelu expects a floating point tensor, got {_kind(x)}: {_remedy(x)}. {_EXPECTED}")
    if not isinstance(hardness, Tensor):
        hardness = torch.full((), check_hardness(hardness), dtype=torch.float64, device=x.device)
    elif not _dense(hardness):
        got = f"{_kind(hardness)}: {_remedy(hardness)}"
        raise TypeError(f"lambda_gelu expects hardness as a number or a floating point tensor, got {got}. {_EXPECTED}")
    elif hardness.device != x.device and not (hardness.dim() == 0 and hardness.device.type == "cpu"):
        raise ValueError(_elsewhere(x, hardness))
    if hardness.numel() != 1 and not _broadcasts(hardness.shape, x.shape):
        raise ValueError(
            f"hardness of shape {tuple(hardness.shape)} does not broadcast to x of shape {tuple(x.shape)}: expected one λ, "
            f"or shape (features,) = {tuple(x.shape[-1:])} for one per neuron"
        )
    if hardness.dim() > x.dim():
        hardness = hardness.reshape(())  # shape (1,) would broadcast a zero-dim x
    if torch.compiler.is_compiling() or transformed():
        # Torch's operations are what transforms know and compilers fuse. What a compiler derives from them saves x and λ
        # alone too, and takes F.gelu's time (scripts.benchmarks.run --only compile), where derivatives by hand fused worse.
        return value(x, hardness, member)
    out: Tensor = LambdaGELUFunction.apply(x, hardness, base)  # type: ignore[no-untyped-call]
    return out


def lambda_gelu_reference(x: Tensor, hardness: Tensor | float, base: str = "gelu") -> Tensor:
    """`lambda_gelu` as plain autograd operations, x · gate(λx): slower, four times the saved memory, and obviously right.

    Args:
        x: floating point, any shape; computed in its own dtype, half precision too.
        hardness: λ, dimensionless; a number, or a tensor that broadcasts to `x`. Not checked.
        base: as in `lambda_gelu`.

    Returns:
        The shape of `x`, in the dtype that torch promotes `x` and λ to.

    Raises:
        ValueError: unknown base.

    Examples:
        >>> import torch
        >>> import hf_lambda_gelu as hlg
        >>> x = torch.linspace(-3.0, 3.0, 7)
        >>> torch.allclose(hlg.lambda_gelu(x, 2.0), hlg.lambda_gelu_reference(x, 2.0), atol=1e-6)
        True
    """
    return x * get_base(base).gate(x * hardness)


_EXPECTED = "Dense ones of float32, bfloat16, float16 and float64 are taken"


def _dense(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in _DTYPES and x.layout is torch.strided and not x.is_nested


def _kind(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested:
        return f"{x.dtype} in a nested tensor"
    return str(x.dtype) if x.layout is torch.strided else f"{x.dtype} in layout {x.layout}"


def _remedy(x: object) -> str:
    """What makes a dense floating point tensor of it."""
    if not isinstance(x, Tensor):
        return "make a tensor of it"
    if x.is_nested:
        return "pad it by .to_padded_tensor(0.0)"
    if x.layout is not torch.strided:
        return "call .to_dense() first"
    if x.is_quantized:
        return "call .dequantize() first"
    return "take its real part" if x.is_complex() else "convert it with .float() first"


def _elsewhere(x: Tensor, hardness: Tensor) -> str:
    advice = "move one to the device of the other (model.to(device) moves λ)"
    if "meta" in (x.device.type, hardness.device.type):
        advice = "on meta there are no values: load the weights, or move the module by to_empty(device=…) and initialise it"
    return f"hardness is on device {str(hardness.device)!r}, x is on device {str(x.device)!r}: {advice}"


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
