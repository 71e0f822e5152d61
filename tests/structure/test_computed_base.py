"""Own activations, known by what they compute: which are, which are not, and what trying them leaves alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.modules import probed_base
from hf_lambda_gelu.structure.smooth_activations import smooth_modules


def module(forward: Any, **attributes: Any) -> nn.Module:
    made: nn.Module = type("Own", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


OWN: dict[str, tuple[nn.Module, str | None]] = {
    "erf": (module(lambda self, x: x * 0.5 * (1 + torch.erf(x / 2**0.5))), "gelu"),
    "tanh": (module(lambda self, x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))), "gelu_tanh"),
    "sigmoid": (module(lambda self, x: x * torch.sigmoid(self.scale * x), scale=1.702), "quick_gelu"),
    "division": (module(lambda self, x: x / (1 + torch.exp(-x))), "silu"),
    "function kept": (module(lambda self, x: self.function(x), function=F.silu), "silu"),
    "method kept": (ACT2FN["gelu_python"], "gelu"),
    "script": (torch.jit.script(nn.Sequential(nn.SiLU()))[0], "silu"),
    # all the same between −6 and 6
    "cut off at 10": (module(lambda self, x: F.gelu(x).clamp(-10, 10)), None),
    "cut off at 1000": (module(lambda self, x: F.gelu(x).clamp(max=1e3)), None),
    "zero near 0": (module(lambda self, x: F.silu(x) * (x.abs() > 1e-5)), None),
    "an offset": (module(lambda self, x: F.silu(x) + 1e-6), None),
    "another scale": (module(lambda self, x: x * torch.sigmoid(1.71 * x)), None),
    "mish": (module(lambda self, x: F.mish(x)), None),
    "hard": (module(lambda self, x: F.hardswish(x)), None),
    "dropout": (module(lambda self, x: F.dropout(F.gelu(x), 0.1, self.training)), None),
    "random always": (module(lambda self, x: F.gelu(x) * torch.rand(()).round()), None),
    "by mode": (module(lambda self, x: F.gelu(x) if not self.training else x), None),
    "of the whole": (module(lambda self, x: F.gelu(x - x.mean() + x.mean())), None),
    "in half": (module(lambda self, x: F.gelu(x.bfloat16()).to(x.dtype)), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", OWN)
def test_base(name: str, device: str, dtype: torch.dtype) -> None:
    """The same under every default dtype and device, within autocast, and in half precision models."""
    own, base = OWN[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.autocast("cpu", torch.bfloat16):
            assert probed_base(own) == base
    finally:
        torch.set_default_dtype(before)


def test_converted_in_half_precision() -> None:
    """In a bf16 model built under a bf16 default: converted, and it computes what it did up to its own rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Sequential(nn.Linear(8, 8), OWN["division"][0], nn.Linear(8, 8))
        x = torch.randn(4, 8)
        expected = model(x)
        assert [site.base for site in hlg.convert(model).sites] == ["silu"]
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=1e-2)
    finally:
        torch.set_default_dtype(before)


def test_not_tried() -> None:
    """What has a state, sets one, prints, or has hooks that do is left as it was; no random number is drawn."""
    said: list[str] = []

    def counting(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        return F.gelu(x)

    def keeping(self: Any, x: Tensor) -> Tensor:
        self.seen.append(x)
        return F.gelu(x)

    def printing(self: Any, x: Tensor) -> Tensor:
        print("called")
        return F.gelu(x)

    def closing(self: Any, x: Tensor) -> Tensor:
        said.append("called")
        return F.gelu(x)

    counts, keeps = module(counting, count=0), module(keeping, seen=[])
    assert [probed_base(m) for m in (counts, keeps, module(printing))] == [None] * 3
    assert (counts.count, keeps.seen) == (0, [])
    hooked = module(lambda self, x: F.gelu(x))
    hooked.register_forward_hook(lambda m, args, output: said.append("hook"))
    assert probed_base(hooked) == "gelu"
    assert said == []
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    probed_base(OWN["random always"][0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index, union-attr]
    assert probed_base(module(closing)) is None


@pytest.mark.parametrize("key", ["gelu_10", "hardswish"])
def test_reason(key: str) -> None:
    """Of what is not of the family, the real reason is said, and no advice that was taken already."""
    act = nn.Hardswish() if key == "hardswish" else ACT2FN[key]
    model = nn.Sequential(nn.Linear(4, 4), act)
    for hard_coded in (False, True):
        with pytest.raises(hlg.ConversionError, match="none of the four activations that λ takes to ReLU") as error:
            hlg.convert(model, hard_coded=hard_coded)
        assert "hard_coded" not in str(error.value)
    assert [left.what for left in smooth_modules(model)] == [type(act).__name__]
