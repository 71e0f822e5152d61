"""`LambdaGELU`, the activation module with a learnable hardness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .._compat import transformed, was_loaded
from .bases import get_base
from .copies import change, is_here, whole
from .functional import lambda_gelu
from .hardness import MAX_HARDNESS, check_hardness, hardness_from_raw


class LambdaGELU(nn.Module):
    r"""x · gate(λx) with one learnable hardness λ ≥ 1.

    The paper (arXiv 2603.21991) keeps λ ≥ 1 by λ = 1 + softplus(s / t), so s = t softplus⁻¹(λ − 1) is the same λ in another
    unit. The parameter here is λ itself, so that a step of any optimizer is a step of λ, whatever the optimizer does
    between its steps. [derived] The paper starts at s = 0, λ = 1 + ln 2; the default here is λ = 1, since a pretrained
    model must keep its function.

    Args:
        init_hardness: λ at the start, ≥ 1.
        base: "gelu", "gelu_tanh", "quick_gelu" or "silu", see `lambda_gelu`.

    Attributes:
        unclipped_hardness: the parameter, λ where that is ≥ 1, shape (1,), fp32 whatever dtype the model has or is cast to:
            in bf16, steps of the usual size would round to nothing. Casting to float64 is followed. Below 1 it counts as 1,
            with the gradient of λ, so that it finds its way back; `attach_hardness_update` does not let it go there.

    Shapes: input and output any, same floating point dtype; λ has no unit.

    Raises:
        ValueError: `init_hardness` is below 1, above 1e30 or NaN, or the base is unknown.

    Examples:
        >>> import torch
        >>> import hf_lambda_gelu as hlg
        >>> act = hlg.LambdaGELU(init_hardness=2.0)
        >>> act
        LambdaGELU(hardness=2, base='gelu')
        >>> round(act(torch.tensor(1.0)).item(), 4)  # Φ(2)
        0.9772
        >>> act.set_hardness(160.0)
        >>> round(act(torch.tensor(-1.0)).item(), 4)
        -0.0
    """

    unclipped_hardness: nn.Parameter
    # what it took the place of, if `convert` made it: transformers' name, or the module where no config attribute governs it
    stock_key: str = ""
    replaced: nn.Module | None = None
    # gets an entry at each call, for the time of a run: a hook would switch off the fused kernels that are looked for
    calls: list[None] | None = None

    def __init__(self, init_hardness: float = 1.0, base: str = "gelu") -> None:
        super().__init__()
        self.base = get_base(base).name
        self.init_hardness = check_hardness(init_hardness)
        self.as_relu = False  # set by `gates_as_relu` for the time of an evaluation
        self.unclipped_hardness = nn.Parameter(torch.empty(1, dtype=torch.float32, device=None))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets λ back to `init_hardness`."""
        self.set_hardness(self.init_hardness)

    @property
    def hardness(self) -> Tensor:
        """λ = max(`unclipped_hardness`, 1), shape (1,), with a derivative of 1 everywhere."""
        free = self.unclipped_hardness
        # which know torch's operations; torch.fx traces with what is no tensor
        if torch.compiler.is_compiling() or transformed() or not isinstance(free, Tensor):
            return free.detach().clamp(min=1.0) + (free - free.detach())
        clipped: Tensor = _Clipped.apply(free)  # type: ignore[no-untyped-call]
        return clipped

    @property
    def raw_hardness(self) -> nn.Parameter:
        """The parameter, by its name in release 0.1, where it held s: optimizers built that way go on."""
        return self.unclipped_hardness

    @torch.no_grad()
    def set_hardness(self, value: float) -> None:
        """Sets λ to `value`, a number from 1 to 1e30 (ValueError otherwise), also in the copies that DeepSpeed steps.

        Where DeepSpeed holds it in bf16 or fp16, it is rounded up: what is set to its target shall not fall short of it.
        """
        checked = check_hardness(value)
        change(self.unclipped_hardness, lambda held: _fill(held, checked))

    def forward(self, x: Tensor) -> Tensor:
        if self.calls is not None:
            self.calls.append(None)
        return F.relu(x) if self.as_relu else lambda_gelu(x, self.hardness, self.base)

    def extra_repr(self) -> str:
        free = self.unclipped_hardness
        value = "on meta" if free.is_meta else f"{self.hardness.item():.4g}" if is_here(free) else "sharded"
        return f"hardness={value}, base={self.base!r}"

    # transformers sets this flag on every module once its weights are in place. `from_pretrained` leaves a parameter that
    # the checkpoint lacks as uninitialised memory and no `_init_weights` knows this class, so this is the moment to
    # initialise λ. `init.constant_` skips a parameter that was loaded.
    @property
    def _is_hf_initialized(self) -> bool:
        return bool(self.__dict__.get("_initialized_by_hf", False))

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_initialized_by_hf"] = value
        if not value or self.unclipped_hardness.is_meta:
            return
        if was_loaded(self.unclipped_hardness):
            _check_loaded(self.unclipped_hardness, "the checkpoint's unclipped_hardness")
        else:
            init.constant_(self.unclipped_hardness, self.init_hardness)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # before anything is copied: a NaN λ would turn every logit into NaN, far from its cause
        name, raw = prefix + "unclipped_hardness", prefix + "raw_hardness"
        if isinstance(state_dict.get(raw), Tensor) and name not in state_dict:  # of a release that kept s
            _check_loaded(state_dict[raw], raw)
            state_dict[name] = hardness_from_raw(state_dict.pop(raw))
        loaded = state_dict.get(name)
        if isinstance(loaded, Tensor) and not loaded.is_meta and loaded.numel():
            _check_loaded(loaded, name)
            if loaded.dtype in (torch.float16, torch.bfloat16):  # assign=True would take the dtype over
                state_dict[name] = loaded.float()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LambdaGELU:
        # .half() and .to(bfloat16) move λ but do not round it
        kept, grad = self.unclipped_hardness.data, self.unclipped_hardness.grad
        grad = None if grad is None else grad.detach()  # an alias, as the cast replaces the data of the gradient itself
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        raw = self.unclipped_hardness
        if kept.is_meta and not raw.is_meta:  # memory as it was found (to_empty)
            self.reset_parameters()
        elif raw.dtype in (torch.float16, torch.bfloat16):
            raw.grad = None  # a gradient has its parameter's dtype, at every moment
            raw.data = kept.to(raw.device)
            raw.grad = None if grad is None else grad.to(raw.device)
        return self


class _Clipped(torch.autograd.Function):
    """max(λ, 1) with a derivative of 1 everywhere, in one operation: a model's launches cost as much as its activations."""

    @staticmethod
    def forward(ctx: Any, free: Tensor) -> Tensor:
        return free.clamp(min=1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _fill(held: Tensor, value: float) -> None:
    held.fill_(value)
    if held.dtype in (torch.bfloat16, torch.float16):
        above = torch.nextafter(held, torch.full_like(held, torch.inf))
        held.copy_(torch.where(held.double() < value, above, held))  # as a bf16 number, the value would be rounded too


def hardness_sites(model: nn.Module) -> dict[str, LambdaGELU]:
    """Finds the λ-GELU modules of a model.

    Returns:
        {module name: LambdaGELU}, in network order, each module once under its first name; empty if there is none.

    Examples:
        >>> from torch import nn
        >>> import hf_lambda_gelu as hlg
        >>> model = nn.Sequential(nn.Linear(4, 8), hlg.LambdaGELU(), nn.Linear(8, 2))
        >>> hlg.hardness_sites(model)
        {'1': LambdaGELU(hardness=1, base='gelu')}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LambdaGELU)}


def hardness_profile(model: nn.Module) -> dict[str, float]:
    """Reads the hardness of every site.

    Returns:
        {module name: λ}, λ ≥ 1 as a Python number, in network order; empty if the model has no λ-GELU. Of a model that FSDP2
        or ZeRO-3 has sharded, every process must ask.

    Examples:
        >>> from torch import nn
        >>> import hf_lambda_gelu as hlg
        >>> model = nn.Sequential(nn.Linear(4, 8), hlg.LambdaGELU(init_hardness=3.0), nn.Linear(8, 2))
        >>> {name: round(hardness, 4) for name, hardness in hlg.hardness_profile(model).items()}
        {'1': 3.0}
    """
    sites = hardness_sites(model)
    if not sites:
        return {}
    with torch.no_grad():  # one transfer for all layers
        free = whole([site.unclipped_hardness for site in sites.values()])
        values = torch.cat([value.reshape(1).float() for value in free]).clamp(min=1.0).tolist()
    return dict(zip(sites, values, strict=True))


def _check_loaded(value: Tensor, name: str) -> None:
    if not value.is_meta and not bool((torch.isfinite(value) & (value <= MAX_HARDNESS)).all()):
        raise ValueError(
            f"{name} is {value.flatten().tolist()}: expected finite numbers, of {MAX_HARDNESS:g} at most. The checkpoint is "
            "damaged; take an earlier one, or drop the tensor to start from the initial hardness"
        )
