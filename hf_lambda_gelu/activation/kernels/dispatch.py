"""The registered operators behind `lambda_gelu`, and the choice of the kernel that runs them.

`torch.ops.hf_lambda_gelu.forward(x, hardness, base)` and `.backward(grad, x, hardness, base)` run a fused kernel where one
serves (C++ for fp32 and bf16 on a CPU, Triton on CUDA), and torch's own operations elsewhere. Compilers and torch.func never
see the operators: `lambda_gelu` gives them the formula.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..._compat import dispatch_modes, function_modes, jit_traces, stacked, transformed
from ..bases import get_base
from . import cpu, eager
from .layout import BASE_NUMBERS, view

_NAME = "hf_lambda_gelu"
Choice = Literal["auto", "fused", "torch"]
_choice: Choice = "auto"


class KernelUnavailable(RuntimeError):
    """A fused kernel was asked for, by `set_kernels("fused")`, and cannot run; the message says what is missing.

    Examples:
        >>> import torch
        >>> import hf_lambda_gelu as hlg
        >>> before = hlg.set_kernels("fused")
        >>> try:
        ...     hlg.lambda_gelu(torch.ones(3, dtype=torch.float64), 2.0)
        ... except hlg.KernelUnavailable as error:
        ...     print(str(error).split(";")[0])
        there is no fused kernel for torch.float64 on cpu
        >>> hlg.set_kernels(before)
        'fused'
    """


def set_kernels(choice: Choice) -> Choice:
    """Chooses what runs λ-GELU in eager mode, in this process; returns the choice before.

    "auto" (the default) takes the fused kernel where there is one and says once, in a warning, what keeps it from running.
    "fused" raises instead. "torch" takes torch's own operations: five to eight times the time of F.gelu on a CPU.

    Raises:
        ValueError: none of the three.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> hlg.set_kernels("torch")
        'auto'
        >>> hlg.set_kernels("auto")
        'torch'
    """
    global _choice
    if choice not in ("auto", "fused", "torch"):
        raise ValueError(f"unknown choice of kernels {choice!r}: expected 'auto', 'fused' or 'torch'")
    before, _choice = _choice, choice
    return before


class Kernel(Protocol):
    """What a module with a fused kernel offers: `cpu`, `cuda`."""

    @property
    def DTYPES(self) -> tuple[torch.dtype, ...]:
        """The dtypes of x that it takes."""

    def unavailable(self) -> str | None:
        """What keeps the kernel from running on this machine, in words; None if nothing does."""

    def forward(self, x: Tensor, hardness: Tensor, base: str) -> Tensor:
        """f(x; λ), laid out as x."""

    def backward(self, grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
        """∂L/∂x, laid out as x, and ∂L/∂λ, of λ's shape and dtype."""


class LambdaGELUFunction(torch.autograd.Function):
    """f = x gate(λx), with ∂f/∂x = gate(u) + u gate'(u) and ∂f/∂λ = x² gate'(u), u = λx. [derived]

    Saves x and λ for the backward pass and nothing else, which is what `F.gelu` keeps. Under `create_graph` the gradients
    are torch's operations, and so differentiable again.
    """

    # without setup_context, which costs more than a small kernel and which torch.func alone would need
    @staticmethod
    def forward(ctx: Any, x: Tensor, hardness: Tensor, base: str) -> Tensor:
        _save(ctx, (x, hardness, base), None)
        if not _operators(x):
            return eager.value(x, hardness, get_base(base))
        forward: Callable[..., Tensor] = _forward if _unseen() else torch.ops.hf_lambda_gelu.forward
        return forward(x, hardness, base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, hardness = ctx.saved_tensors
        if torch.is_grad_enabled() or not _operators(x) or stacked(grad) or transformed():
            return *eager.gradients(grad, x, hardness, get_base(ctx.base)), None
        backward = _backward if _unseen() else torch.ops.hf_lambda_gelu.backward
        return *backward(grad, x, hardness, ctx.base), None

    @staticmethod
    def symbolic(graph: Any, x: Any, hardness: Any, base: str) -> Any:
        """What torch's older ONNX exporter (dynamo=False) asks for an operator of ONNX: there is none."""
        raise RuntimeError(
            "ONNX has no operator for λ-GELU, and torch.onnx.export(dynamo=False) cannot take it apart: put λ into the "
            "weights first, by hlg.fold(model), or call hlg.export_onnx(model, path), which does so on a copy"
        )


def _unseen() -> bool:
    # no one is there to see an operator; to call one takes longer than a small kernel does
    return not (dispatch_modes() or function_modes() or jit_traces())


def _operators(x: Tensor) -> bool:
    # a tensor subclass (DTensor) knows torch's operations, not ours
    return type(x) in (Tensor, nn.Parameter)


def _forward(x: Tensor, hardness: Tensor, base: str) -> Tensor:
    fused = _fused(x, hardness, base)
    return eager.forward(x, hardness, get_base(base)) if fused is None else fused.forward(x, hardness, base)


def _backward(grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
    fused = _fused(x, hardness, base)
    if fused is None:
        return eager.backward(grad, x, hardness, get_base(base))
    return fused.backward(grad, x, hardness, base)


def _fused(x: Tensor, hardness: Tensor, base: str) -> Kernel | None:
    """The module whose kernel takes these tensors and knows the base, if the choice allows it."""
    if _choice == "torch":
        return None
    kernel = _kernel(x.device.type)
    missing: str | None = None
    if kernel is None:
        missing = f"there is no fused kernel for {x.device.type} devices"
    elif x.dtype not in kernel.DTYPES:
        missing = f"there is no fused kernel for {x.dtype} on {x.device.type}"
    elif base not in BASE_NUMBERS:
        missing = f"there is no fused kernel for the base {base!r}"
    elif hardness.numel() > 1 and view(_dense(x), hardness) is None:
        missing = f"no fused kernel takes λ of shape {tuple(hardness.shape)} over x of shape {tuple(x.shape)}"
    else:
        missing = kernel.unavailable()
        if missing and _choice == "auto":
            _warn(missing)
    if missing and _choice == "fused":
        raise KernelUnavailable(f"{missing}; hlg.set_kernels('auto') runs torch's own operations instead")
    return None if missing else kernel


@functools.cache
def _kernel(device: str) -> Kernel | None:
    if device == "cuda":
        from . import cuda  # which imports Triton: seconds, and for nothing on a CPU

        return cuda
    return cpu if device == "cpu" else None


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else torch.empty_like(x, device="meta")


@functools.cache  # one warning for each reason
def _warn(missing: str) -> None:
    warnings.warn(
        f"λ-GELU runs on torch's own operations, several times slower than F.gelu: {missing}. "
        "hlg.set_kernels('torch') silences this",
        stacklevel=2,
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor | None) -> None:
    x, hardness, ctx.base = inputs
    ctx.save_for_backward(x, hardness)


def _register() -> torch.library.Library:
    def by_name(function: str) -> Callable[..., Any]:  # so that a module that is imported afresh takes the operators over
        return lambda *args: getattr(sys.modules[__name__], function)(*args)

    library = torch.library.Library(_NAME, "FRAGMENT")
    if hasattr(getattr(torch.ops, _NAME), "forward"):
        return library
    library.define("forward(Tensor x, Tensor hardness, str base) -> Tensor")
    library.define("backward(Tensor grad, Tensor x, Tensor hardness, str base) -> (Tensor, Tensor)")
    library.impl("forward", by_name("_forward"), "CompositeExplicitAutograd")
    library.impl("backward", by_name("_backward"), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAME}::forward", lambda x, *_: torch.empty_like(x), lib=library)
    torch.library.register_fake(
        f"{_NAME}::backward", lambda _, x, hardness, *__: (torch.empty_like(x), torch.empty_like(hardness)), lib=library
    )
    torch.library.register_autograd(f"{_NAME}::forward", LambdaGELUFunction.backward, setup_context=_save, lib=library)
    return library


_library = _register()
