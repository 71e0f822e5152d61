"""`harden`: the Trainer's switch without a Trainer, against `relu_ize` with the same refit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import hf_lambda_gelu as hlg


def batches(model: nn.Module, count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 99, (8, 9), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_the_same_parameters_go_on(name: str) -> None:
    """Names and memory are what they were, λ is at its target, and an optimizer goes on."""
    model = _converted(name)
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(hlg.parameter_groups(model), lr=0.1)
    report = hlg.harden(model, batches(model))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    base = "silu" if name == "llama" else "gelu"
    assert list(hlg.hardness_profile(model).values()) == pytest.approx([hlg.target_hardness(base=base)] * 2, rel=1e-6)
    assert {site.method for site in report.sites} == {"least_squares"}
    model(**batches(model)[0])[0].sum().backward()
    optimizer.step()


def test_then_relu_is_what_a_refit_makes_of_the_soft_network() -> None:
    """`relu_ize` with a refit, of a twin: the same weights."""
    soft, hard = _converted("bert-classifier"), _converted("bert-classifier")
    hlg.relu_ize(soft, calibration=batches(soft), compensate="least_squares")
    hlg.harden(hard, batches(hard))
    hlg.relu_ize(hard)
    for (key, one), other in zip(hard.state_dict().items(), soft.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=key, rtol=1e-6, atol=1e-7)


def _converted(name: str) -> nn.Module:
    model = tiny.build(name).eval()
    hlg.convert(model, init_hardness=2.0)
    return model


def test_a_harder_gate_stays() -> None:
    model = _converted("bert-classifier")
    names = list(hlg.hardness_sites(model))
    hlg.harden(model, batches(model), targets={names[0]: 40.0, names[1]: 1.0}, compensate="bias")
    assert list(hlg.hardness_profile(model).values()) == [40.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": {}}, "targets names no λ for 2 of 2 sites"),
        ({"compensate": "none"}, "unknown compensate='none'"),
        ({"tolerance": -1.0}, "must be a finite number > 0"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    model = _converted("bert-classifier")
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        hlg.harden(model, batches(model), **options)
    with pytest.raises(ValueError, match="no λ-GELU to replace"):
        hlg.harden(tiny.build("bert-classifier"), batches(model))
    assert tiny.snapshot(model) == before
