"""Convolutions with a kernel, refit: against ridge regressions on torch's own im2col, group by group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.handmade import Handmade, HandmadeConfig
from support.models import randomized
from support.refit_reference import Rows, check, ridge_regression
from support.states import change, parameters
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.conv_windows import Window
from hf_lambda_gelu.surgery.refit.ridge import RIDGES


@pytest.mark.parametrize("options", [
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "padding": (1, 0, 2), "stride": (1, 2, 1)},
    {"groups": 6, "padding": "valid"},
])  # fmt: skip
@pytest.mark.parametrize("convolve", [F.conv1d, F.conv2d, F.conv3d])
@pytest.mark.parametrize("batch", [(3,), ()])
def test_rows(batch: tuple[int, ...], convolve: Callable[..., Tensor], options: dict[str, object]) -> None:
    """Rows times the weight are what the convolution puts out, in one to three dimensions, with a batch and without."""
    n = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}[convolve]
    options = {name: value[:n] if isinstance(value, tuple) else value for name, value in options.items()}
    x = torch.randn(*batch, 6, *(9, 8, 7)[:n], dtype=torch.float64)
    weight = torch.randn(12, 6 // int(options.get("groups", 1)), *(3, 2, 3)[:n], dtype=torch.float64)  # type: ignore[call-overload]
    wanted = convolve(x, weight, **options).movedim(len(batch), -1)
    window = Window.of(weight.shape[2:], options)
    parts = [
        window.rows(x.movedim(len(batch), -1), g) @ part.flatten(1).T for g, part in enumerate(weight.chunk(window.groups))
    ]
    torch.testing.assert_close(torch.cat(parts, -1), wanted.reshape(-1, 12))


def pictures(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"inputs_embeds": 2.0 * torch.randn(3, 6, 5, 8, generator=generator)} for _ in range(count)]


def networks(kind: str) -> tuple[Handmade, Handmade]:
    """A converted model, and the same as stock has it."""
    model = randomized(Handmade(HandmadeConfig(kind)))
    if kind == "norm":
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.running_mean.normal_()
    smooth = Handmade(HandmadeConfig(kind)).eval()
    smooth.load_state_dict({name: value for name, value in model.state_dict().items() if "hardness" not in name})
    return model, smooth


def windows(conv: nn.Conv2d, x: Tensor) -> np.ndarray:
    """(rows, channels, kernel): torch's im2col of a channels last input; padding "same" is the left half first."""
    x = x.movedim(-1, 1)
    if conv.padding == "same":
        ends = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        x = F.pad(x, [end for total in reversed(ends) for end in (total // 2, total - total // 2)])
    padding = 0 if conv.padding == "same" else conv.padding
    taps = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    return taps.movedim(1, -1).reshape(-1, conv.in_channels, int(np.prod(conv.kernel_size))).double().numpy()


@pytest.mark.parametrize("kind", ["3 × 3", "stride", "depthwise", "dilated", "norm"])
@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_against_im2col(kind: str, method: str) -> None:
    """ΔW and c of each group; of a convolution without a bias, c is in the batch norm after it."""
    model, smooth = networks(kind)
    batches = pictures(10, 0)
    report = hlg.relu_ize(model, calibration=batches, compensate=method).compensation  # type: ignore[arg-type]
    assert report is not None
    (site,) = report.sites
    conv, groups = smooth.second, smooth.second.groups
    gain = np.ones(conv.out_channels)
    if kind == "norm":
        gain = (smooth.norm.weight / (smooth.norm.running_var + smooth.norm.eps).sqrt()).detach().double().numpy()
    with torch.no_grad():
        pre = [smooth.first(batch["inputs_embeds"]) for batch in batches]
        features = np.concatenate([windows(conv, x.relu()) for x in pre])
        outputs = [
            np.concatenate([conv(f(x).movedim(-1, 1)).movedim(1, -1).flatten(0, 2).double().numpy() for x in pre])
            for f in (F.gelu, torch.relu)
        ]
    held = np.repeat(np.arange(30) % 5 == 0, len(features) // 30)
    moved = (model.second.weight - conv.weight).detach().double().flatten(1).numpy()
    biases = (model.norm.bias - smooth.norm.bias) if kind == "norm" else (model.second.bias - conv.bias)
    shift = biases.detach().double().numpy() / gain
    assert site.rows == len(features)
    for g in range(groups):
        out = slice(g * len(moved) // groups, (g + 1) * len(moved) // groups)
        taps = features[:, g * features.shape[1] // groups : (g + 1) * features.shape[1] // groups].reshape(
            len(features), -1
        )
        rows = Rows(taps, (outputs[0] - outputs[1])[:, out], outputs[0][:, out], held)
        if groups == 1:
            check(rows, gain, True, method, site, (moved.T, shift))
            continue
        closest(rows, method, (moved[out].T, shift[out]))


def closest(rows: Rows, method: str, got: tuple[np.ndarray, np.ndarray]) -> None:
    """That of one group is a solution of one ridge, or of the biases alone: the report has the sum over groups."""
    solutions = [(np.zeros_like(got[0]), rows.e.mean(0))]
    if method == "least_squares":
        solutions += [ridge_regression(rows.r, rows.e, ridge, True) for ridge in RIDGES]
    distances = [max(np.abs(got[0] - w).max(), np.abs(got[1] - b).max()) / max(np.abs(b).max(), 1e-3) for w, b in solutions]
    assert min(distances) < 2e-3


@pytest.mark.parametrize("kind", ["3 × 3", "depthwise", "norm"])
def test_nearer_on_other_pictures(kind: str) -> None:
    """The outputs of other pictures, and of stock with the refit weights."""
    (model, smooth), (naive, _) = networks(kind), networks(kind)
    hlg.relu_ize(model, calibration=pictures(60, 0), compensate="least_squares")
    hlg.relu_ize(naive, force=True)
    others = pictures(5, 1)
    assert change(smooth, model, others) < 0.7 * change(smooth, naive, others)
    stock = Handmade(HandmadeConfig(kind, hidden_act="relu")).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(stock(**others[0])["logits"], model(**others[0])["logits"])


@pytest.mark.parametrize("kind", ["norm beside", "norm without numbers"])
def test_a_norm_that_does_not_do_as_a_bias_is_left_alone(kind: str) -> None:
    """Something else takes the map's output up too, or the norm has no bias: weights alone are refit."""
    model, _ = networks(kind)
    before = parameters(model)
    report = hlg.relu_ize(model, calibration=pictures(10, 0), compensate="least_squares").compensation
    assert report is not None
    assert "weights only" in report.sites[0].note
    assert {n for n, value in parameters(model).items() if n in before and not torch.equal(value, before[n])} == {
        "second.weight"
    }
