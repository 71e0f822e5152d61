"""Rows with weights, and Gram matrices that are indefinite by rounding, against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lambda_gelu.surgery.refit import held_out
from hf_lambda_gelu.surgery.refit.ridge import Correction, Moments, solve
from hf_lambda_gelu.surgery.refit.row_weights import RowWeights

CPU = torch.device("cpu")


def weighted() -> tuple[Moments, np.ndarray, np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    r, e, w = torch.randn(6000, 5) + 3.0, torch.randn(6000, 2), torch.rand(6000)
    e += r @ torch.randn(5, 2)
    moments = Moments.empty(5, 2, CPU)
    for part in range(0, 6000, 2500):
        moments.add(r[part : part + 2500], e[part : part + 2500], w[part : part + 2500])
    return moments, r.double().numpy(), e.double().numpy(), w.double().numpy()


@pytest.mark.parametrize("biased", [True, False])
def test_weighted_rows(biased: bool) -> None:
    """The correction minimises Σ w ‖e − r ΔW − c‖² + penalty, and the error is that of the rows."""
    moments, r, e, w = weighted()
    assert moments.count == 6000
    assert moments.mass == pytest.approx(w.sum())
    found = solve(moments, "least_squares", biased=biased, ridge=0.01)
    mean_r, mean_e = (w[:, None] * r).sum(0) / w.sum(), (w[:, None] * e).sum(0) / w.sum()
    x, y = (r - mean_r, e - mean_e) if biased else (r, e)
    gram = (x * w[:, None]).T @ x
    weight = np.linalg.solve(gram + 0.01 * gram.diagonal().mean() * np.eye(5), (x * w[:, None]).T @ y)
    assert found.weight is not None
    assert np.allclose(found.weight.numpy(), weight, rtol=1e-5, atol=1e-6)
    bias = mean_e - mean_r @ weight if biased else np.zeros(2)
    error = float((w[:, None] * (e - r @ weight - bias) ** 2).sum())
    assert moments.error(found) == pytest.approx(error, rel=1e-5)


def test_weights_of_one_change_nothing() -> None:
    """Rows of weight one have the sums of rows without weights, but for rounding."""
    torch.manual_seed(0)
    r, e = torch.randn(100, 4), torch.randn(100, 3)
    one, other = Moments.empty(4, 3, CPU), Moments.empty(4, 3, CPU)
    one.add(r, e)
    other.add(r, e, torch.ones(100))
    for name, value in vars(one).items():
        assert torch.allclose(torch.as_tensor(value), torch.as_tensor(getattr(other, name)), rtol=1e-6, atol=1e-5), name


def test_huge_streams_count_little() -> None:
    """A row whose stream is a hundred times the median's counts 1/10,000; the usual ones count one at most."""
    weigh = RowWeights()
    stream = torch.ones(9, 4)
    stream[0] *= 100.0
    stream[1] *= 0.5
    found = weigh.of(stream)
    assert found[0].item() == pytest.approx(1e-4)
    assert found[1:].tolist() == [1.0] * 8
    assert weigh.of(torch.full((1, 4), 2.0)).item() == pytest.approx(0.25)  # by the median of the first rows


def test_indefinite_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a ridge is too small for a Gram matrix that rounding has made indefinite, a larger one is taken."""
    moments, *_ = weighted()
    moments.rr = moments.rr - 1.02 * float(torch.linalg.eigvalsh(_centred(moments))[0]) * torch.eye(5, dtype=torch.float64)
    moments.rr -= 0.02 * float(_centred(moments).diagonal().mean()) * torch.eye(5, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        solve(moments, "least_squares", ridge=0.01)
    correction, before, after = held_out.choose(moments, moments, "least_squares")
    assert isinstance(correction, Correction)
    assert correction.method == "least_squares"
    assert (correction.ridge or 0.0) >= 0.1
    assert correction.indefinite
    assert math.isfinite(after)
    assert after < before


def _centred(moments: Moments) -> torch.Tensor:
    return moments.rr - torch.outer(moments.r, moments.r) / moments.mass
