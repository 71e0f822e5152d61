"""`LambdaGELU`: what its parameter is, and λ through casts, copies and state dicts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu import LambdaGELU

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody initialised reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameterization(dtype: torch.dtype) -> None:
    """λ = max(p, 1) to the last bit, and a slope of 1 everywhere, or a p below 1 would never come back."""
    module = LambdaGELU().to(dtype)
    for free in (-3.3, 0.3, 1 - EPS, 1.0, 1 + EPS, 1.7, 158.577, 1e6):
        module.unclipped_hardness.data.fill_(free)
        hardness = module.hardness
        (slope,) = torch.autograd.grad(hardness, module.unclipped_hardness)
        assert hardness.dtype is slope.dtype is dtype
        assert hardness.shape == (1,)
        assert hardness.item() == torch.tensor(max(free, 1.0), dtype=dtype).item()
        assert slope.item() == 1.0


def test_set_hardness_round_trip() -> None:
    """The requested numbers themselves are the reference, from the first float above 1 to 1e6."""
    module = LambdaGELU()
    above = [1 + EPS, 1 + 1e-6, 1.0001, 1.001, 1.05, 1 + np.log(2), 1.6931, 2.0, *np.logspace(0.05, 6, 200)]
    for value in above:
        module.set_hardness(value)
        assert module.hardness.item() == pytest.approx(value, rel=EPS)
        assert LambdaGELU(value).hardness.item() == module.hardness.item()
    module.reset_parameters()
    assert module.unclipped_hardness.item() == 1.0


def test_starts_at_exactly_one() -> None:
    """1.0, to the bit, with a gradient: the module is then the stock activation of its base."""
    module = LambdaGELU()
    assert module.hardness.item() == 1.0
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(module(x), nn.functional.gelu(x), rtol=1e-6, atol=1e-6)
    module(x).sum().backward()
    assert module.unclipped_hardness.grad.item() != 0.0


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(device, float16)": lambda m: m.to("cpu", torch.float16),
    "half, float": lambda m: m.half().float(),
    "bfloat16 on meta": lambda m: m.to("meta").bfloat16(),
}


@pytest.mark.parametrize("cast", list(CASTS))
def test_half_precision_leaves_hardness_alone(cast: str) -> None:
    """Casting the model around it: λ keeps fp32, its bits and its identity for the optimizer, the other weights do not."""
    model = nn.Sequential(nn.Linear(3, 3), LambdaGELU(7.3))
    raw, bits = model[1].unclipped_hardness, model[1].unclipped_hardness.item()
    CASTS[cast](model)
    assert model[1].unclipped_hardness.dtype is torch.float32
    assert (model[0].weight.dtype is torch.float32) == cast.endswith("float")
    if not model[0].weight.is_meta:
        assert model[1].unclipped_hardness is raw
        assert raw.item() == bits
        assert model(torch.ones(2, 3, dtype=model[0].weight.dtype)).dtype is model[0].weight.dtype


def test_float64_is_followed() -> None:
    """`.double()` converts λ without a change of value, in float64 arithmetic from there on."""
    module = LambdaGELU(7.3)
    before = module.unclipped_hardness.item()
    assert module.double().unclipped_hardness.dtype is torch.float64
    assert module.hardness.item() == module.unclipped_hardness.item() == before


def test_half_precision_with_a_gradient() -> None:
    """A cast between backward and step: torch's own rule is that a gradient has its parameter's dtype."""
    module = LambdaGELU(2.0)
    module(torch.randn(4)).sum().backward()
    module.half()
    assert module.unclipped_hardness.grad.dtype is module.unclipped_hardness.dtype


@pytest.mark.usefixtures("poisoned")
def test_meta_and_back() -> None:
    """From the meta device λ comes back as it was initialised, or by a state dict; NaN memory would show otherwise."""
    module = LambdaGELU(3.0, "silu").to("meta")
    assert module.unclipped_hardness.is_meta
    assert module.hardness.is_meta
    assert "hardness=on meta, base='silu'" in repr(module)
    module.to_empty(device="cpu")
    assert module.hardness.item() == pytest.approx(3.0, rel=2 * EPS)
    with torch.device("meta"):
        module = LambdaGELU()
    module.load_state_dict({"unclipped_hardness": torch.tensor([3.5])}, assign=True)
    assert module.hardness.item() == 3.5
    assert repr(module) == "LambdaGELU(hardness=3.5, base='gelu')"


@pytest.mark.parametrize("s", [-1.7, -0.05, 0.0, 0.31, 15.8577])
@pytest.mark.parametrize("assign", [False, True])
def test_state_of_release_0_1(s: float, assign: bool) -> None:
    """It kept s, λ = 1 + softplus(s / 0.1): numpy's logaddexp in float64. A NaN is named by its own name."""
    model = nn.Sequential(nn.Linear(2, 2), LambdaGELU(5.0))
    state = model.state_dict()
    del state["1.unclipped_hardness"]
    model.load_state_dict({**state, "1.raw_hardness": torch.tensor([s])}, assign=assign)
    assert model[1].hardness.item() == pytest.approx(1 + np.logaddexp(0, s / 0.1), rel=2 * EPS)
    assert isinstance(model[1].unclipped_hardness, nn.Parameter)
    with pytest.raises(ValueError, match=r"1\.raw_hardness is \[nan\]"):
        model.load_state_dict({**state, "1.raw_hardness": torch.tensor([float("nan")])})


def _saved(module: LambdaGELU) -> LambdaGELU:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = LambdaGELU(module.init_hardness, module.base)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["deepcopy", "pickle", "state_dict"]
)
def test_copies(copied: Callable[[LambdaGELU], LambdaGELU]) -> None:
    """The copy computes the same bits, remembers where it started, and is independent of the original."""
    module = LambdaGELU(2.5, "quick_gelu")
    module.set_hardness(17.125)
    twin = copied(module)
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin(x), module(x))
    assert (twin.init_hardness, twin.base) == (2.5, "quick_gelu")
    assert isinstance(twin.unclipped_hardness, nn.Parameter)
    twin.reset_parameters()
    assert (twin.hardness.item(), module.hardness.item()) == (pytest.approx(2.5), pytest.approx(17.125))


@pytest.mark.parametrize(
    ("loaded", "error", "message"),
    [
        (torch.tensor([float("nan")]), ValueError, r"1\.unclipped_hardness is \[nan\]: expected finite numbers.*damaged"),
        (torch.tensor([float("-inf")]), ValueError, r"1\.unclipped_hardness is \[-inf\]"),
        (torch.tensor([0.0, 1.0]), RuntimeError, r"size mismatch for 1\.unclipped_hardness.*\[2\]"),
        (torch.tensor(0.0), RuntimeError, r"size mismatch for 1\.unclipped_hardness"),
        (None, RuntimeError, r"Missing key.*1\.unclipped_hardness"),
    ],
)
def test_damaged_state_dict(loaded: torch.Tensor | None, error: type[Exception], message: str) -> None:
    """The error names the tensor and what is wrong with it, and λ stays what it was."""
    model = nn.Sequential(nn.Linear(2, 2), LambdaGELU(5.0))
    state = {k: v for k, v in (model.state_dict() | {"1.unclipped_hardness": loaded}).items() if v is not None}
    with pytest.raises(error, match=f"(?s){message}"):
        model.load_state_dict(state)
    assert model[1].hardness.item() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_profile_is_in_network_order(dtype: torch.dtype) -> None:
    """Names and values written down while building: order of depth, not of the alphabet, a shared module once."""
    model, expected = nn.Sequential(), {}
    for layer in range(12):
        name = f"{'zyxwvutsrqpo'[layer]}{layer}"
        model.add_module(name, nn.Sequential(nn.Linear(2, 2), nn.GELU() if layer == 4 else LambdaGELU(2.0 + layer)))
        if layer != 4:
            expected[f"{name}.1"] = pytest.approx(2.0 + layer, rel=2 * EPS)
    model.add_module("again", model.z0[1])
    model.to(dtype)
    profile = hlg.hardness_profile(model)
    assert list(profile) == list(expected) == list(hlg.hardness_sites(model))
    assert profile == expected
    assert all(site is model.get_submodule(name) for name, site in hlg.hardness_sites(model).items())
    assert hlg.hardness_profile(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_hardness": 0.5}, "hardness must be a finite number >= 1 .* got 0.5"),
        ({"init_hardness": float("nan")}, "got nan"),
        ({"init_hardness": float("inf")}, "use relu_ize"),
        ({"base": "relu"}, "unknown base 'relu'"),
    ],
)
def test_bad_arguments(arguments: dict[str, float | str], message: str) -> None:
    """Constructor and setter refuse alike, with the value in the message; after a refusal λ is what it was."""
    with pytest.raises(ValueError, match=message):
        LambdaGELU(**arguments)
    if "init_hardness" in arguments:
        module = LambdaGELU(4.0)
        with pytest.raises(ValueError, match=message):
            module.set_hardness(arguments["init_hardness"])
        assert module.hardness.item() == pytest.approx(4.0)
