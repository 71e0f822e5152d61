"""A map whose weight or bias is computed: which one it is, and what makes a parameter of it again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import hf_lambda_gelu as hlg

KINDS: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object], str]] = {
    "weight norm": (
        parametrizations.weight_norm,
        lambda m: parametrize.remove_parametrizations(m, "weight"),
        "weight is computed from parametrizations (weight or spectral norm, for one): call torch.nn.utils."
        "parametrize.remove_parametrizations(module, 'weight')",
    ),
    "spectral norm": (
        parametrizations.spectral_norm,
        lambda m: parametrize.remove_parametrizations(m, "weight"),
        "weight is computed from parametrizations (weight or spectral norm, for one): call torch.nn.utils."
        "parametrize.remove_parametrizations(module, 'weight')",
    ),
    "weight norm by hooks": (
        utils.weight_norm,
        utils.remove_weight_norm,
        "weight is computed from weight_g and weight_v: call torch.nn.utils.remove_weight_norm(module, 'weight')",
    ),
    "spectral norm by hooks": (
        utils.spectral_norm,
        utils.remove_spectral_norm,
        "weight is computed from weight_orig: call torch.nn.utils.remove_spectral_norm(module, 'weight')",
    ),
    "mask": (
        lambda m: prune.random_unstructured(m, "weight", 0.3),
        lambda m: prune.remove(m, "weight"),
        "weight is computed from weight_orig and weight_mask: call torch.nn.utils.prune.remove(module, 'weight')",
    ),
    "mask of the bias": (
        lambda m: prune.random_unstructured(m, "bias", 0.3),
        lambda m: prune.remove(m, "bias"),
        "bias is computed from bias_orig and bias_mask: call torch.nn.utils.prune.remove(module, 'bias')",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_named(kind: str) -> None:
    """The map that takes up the site's output is named, and not another one; done as said, it can be refit."""
    make, undo, message = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    for layer in (model[0], model[2]):
        make(layer)
    hlg.convert(model)
    data = [torch.randn(64, 8) for _ in range(3)]
    with pytest.raises(hlg.SoftGateError) as error:
        hlg.relu_ize(model, calibration=data, compensate="least_squares")
    assert f"(1: 2.{message} before)" in str(error.value)
    undo(model[2])
    report = hlg.relu_ize(model, calibration=data, compensate="least_squares")
    assert report.compensation is not None
    assert [site.weight for site in report.compensation.sites] == ["2.weight"]


def test_looked_at_once() -> None:
    """However many sites feed computed weights, none is computed again for each of them."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            Counted.calls += 1
            return 2.0 * weight

    def outcome(pairs: int) -> int:
        torch.manual_seed(0)
        layers = [layer for _ in range(pairs) for layer in (nn.Linear(8, 8), nn.GELU())]
        model = nn.Sequential(*layers, nn.Linear(8, 8))
        for layer in model[2::2]:
            parametrize.register_parametrization(layer, "weight", Counted())
        hlg.convert(model)
        Counted.calls = 0
        with pytest.raises(hlg.SoftGateError, match=r"the map after none of the sites .*\(1: 2\.weight is computed from"):
            hlg.relu_ize(model, calibration=[torch.randn(64, 8)], compensate="least_squares")
        return Counted.calls

    assert outcome(8) == 2 * outcome(4)  # as runs do, and not by the square
