"""`Moments`, `solve`, `choose` and `effective_rank` against numpy and scikit-learn in float64 on the raw rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from torch import Tensor

from hf_lambda_gelu.surgery.refit.held_out import choose
from hf_lambda_gelu.surgery.refit.ridge import RIDGES, Correction, Moments, effective_rank, solve

Array = NDArray[np.float64]
biased_or_not = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])


def rows(
    n: int, d: int, k: int, seed: int = 0, noise: float = 0.3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Features like those after ReLU, correlated and with a mean, and changes that follow them in part, with a mean too."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / d**0.5
    slope = torch.randn(d, k, generator=torch.Generator().manual_seed(98), dtype=torch.float64) / d**0.5
    r = (torch.randn(n, d, generator=g, dtype=torch.float64) @ mix).relu()
    e = r @ slope + noise * torch.randn(n, k, generator=g, dtype=torch.float64) - 0.4
    return r.to(dtype), e.to(dtype)


def gathered(r: Tensor, e: Tensor) -> Moments:
    moments = Moments.empty(r.shape[1], e.shape[1], torch.device("cpu"))
    moments.add(r, e)
    return moments


def penalty(r: Array, ridge: float, biased: bool) -> float:
    """ρn: ridge × the mean variance of the features (mean square without a bias), times the number of rows."""
    return ridge * len(r) * float((r.var(0) if biased else np.square(r).mean(0)).mean())


def augmented(r: Array, e: Array, alpha: float, biased: bool) -> tuple[Array, Array]:
    """ΔW and c by lstsq: a column of ones for c, and rows √α I with target 0 for the penalty, which spare c."""
    ones = np.ones((len(r), int(biased)))
    d = r.shape[1]
    top, bottom = np.hstack([r, ones]), np.hstack([np.sqrt(alpha) * np.eye(d), np.zeros((d, int(biased)))])
    solution = np.linalg.lstsq(np.vstack([top, bottom]), np.vstack([e, np.zeros((d, e.shape[1]))]), rcond=None)[0]
    return solution[:d], solution[d] if biased else np.zeros(e.shape[1])


def squares(r: Tensor, e: Tensor, change: Correction, scale: Tensor | None = None) -> float:
    """Σ‖scale ⊙ (e − r ΔW − c)‖², row by row."""
    left = e.double() - change.bias - (0.0 if change.weight is None else r.double() @ change.weight)
    return float((left if scale is None else left * scale.double()).square().sum())


@biased_or_not
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize(("n", "d"), [(300, 12), (20, 40), (1, 3), (9000, 6)], ids=str)
def test_least_squares(n: int, d: int, ridge: float, biased: bool) -> None:
    """ΔW and c against lstsq on an augmented system and scikit-learn; more features than rows, one row, three pieces."""
    r, e = rows(n, d, 5)
    change = solve(gathered(r, e), "least_squares", biased=biased, ridge=ridge)
    assert change.method == "least_squares"
    assert change.ridge == ridge
    assert change.weight is not None
    x, y = r.numpy(), e.numpy()
    alpha = penalty(x, ridge, biased) or 1.0  # one row has no variance
    weight, bias = augmented(x, y, alpha, biased)
    np.testing.assert_allclose(change.weight.numpy(), weight, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(change.bias.numpy(), bias, rtol=1e-7, atol=1e-9)
    reference = Ridge(alpha=alpha, fit_intercept=biased, solver="svd").fit(x, y)
    np.testing.assert_allclose(change.weight.numpy(), reference.coef_.T, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(change.bias.numpy(), reference.intercept_ if biased else 0.0, rtol=1e-7, atol=1e-9)


def test_bias_and_none() -> None:
    """ "bias" is the mean of the wanted changes and no ΔW; without a bias it is no change, as "none" is."""
    r, e = rows(50, 4, 3)
    moments = gathered(r, e)
    change = solve(moments, "bias")
    assert (change.weight, change.method, change.ridge) == (None, "bias", None)
    np.testing.assert_allclose(change.bias.numpy(), e.numpy().mean(0), rtol=1e-12)
    for none in (solve(moments, "bias", biased=False), solve(moments, "none"), solve(moments, "none", biased=False)):
        assert (none.weight, none.method, none.ridge) == (None, "none", None)
        assert not none.bias.any()


@biased_or_not
@pytest.mark.parametrize("method", ["none", "bias", "least_squares"])
def test_error(method: str, biased: bool) -> None:
    """The error from the sums against the residuals of other rows than those that gave the change; with scales too."""
    change = solve(gathered(*rows(200, 12, 5)), method, biased=biased)  # type: ignore[arg-type]
    r, e = rows(150, 12, 5, seed=1)
    moments = gathered(r, e)
    scale = torch.tensor([0.5, -2.0, 1e-3, 0.0, 1.0])  # fp32, as a model's layer scale is
    for scales in (None, scale):
        assert moments.error(change, scales) == pytest.approx(squares(r, e, change, scales), rel=1e-10)


def test_error_that_is_nil() -> None:
    """Where the change explains every row, rounding does not make the error negative; and NaN does not pass for 0."""
    for seed in range(8):
        r, e = rows(400, 12, 5, seed=seed, noise=0.0)
        moments = gathered(r, e)
        assert 0.0 <= moments.error(solve(moments, "least_squares", ridge=1e-14)) < 1e-9
    e[3, 2] = float("nan")
    assert np.isnan(gathered(r, e).error(solve(moments, "bias")))


def test_pieces_and_order() -> None:
    """Rows that stream in a few at a time, some of the pieces empty, or in another order, or as the sum of two halves."""
    r, e = rows(5000, 7, 3)
    whole = gathered(r, e)
    pieces = Moments.empty(7, 3, torch.device("cpu"))
    sizes = [1, 0, 63, 4200, 0, 736]
    for r_, e_ in zip(r.split(sizes), e.split(sizes), strict=True):
        pieces.add(r_, e_)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    first, second = gathered(r[:1234], e[:1234]), gathered(r[1234:], e[1234:])
    counts = first.count, second.count
    together = first + second
    assert (first.count, second.count) == counts == (1234, 3766)
    torch.testing.assert_close(first.rr, r[:1234].T @ r[:1234])  # the operands are as they were
    for other in (pieces, gathered(r[order], e[order]), together):
        assert other.count == whole.count == 5000
        for name in ("r", "e", "rr", "re", "ee"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums(dtype: torch.dtype) -> None:
    """Each sum against numpy in float64 on the very values of the rows, in the precision that they come in."""
    r, e = rows(5000, 7, 3, dtype=dtype)
    moments = gathered(r, e)
    x, y = r.double().numpy(), e.double().numpy()
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5  # what fp32 makes of 4,096 products
    for name, wanted in (("r", x.sum(0)), ("e", y.sum(0)), ("rr", x.T @ x), ("re", x.T @ y), ("ee", (y * y).sum(0))):
        got = getattr(moments, name)
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.numpy(), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(("mean", "spread"), [(10.0, 0.1), (100.0, 0.1), (3000.0, 0.1)], ids=str)
def test_large_mean(mean: float, spread: float) -> None:
    """fp32 features of which one has a mean far above its spread: the solution is that of float64 all the same."""
    r, e = rows(3000, 12, 5, dtype=torch.float32)
    r[:, 3] = mean + spread * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    e[:, 1] += mean
    moments = gathered(r, e)
    change = solve(moments, "least_squares", ridge=RIDGES[0])
    assert change.weight is not None
    x, y = r.double().numpy(), e.double().numpy()
    assert float(moments.r[3]) == pytest.approx(x[:, 3].sum(), rel=1e-12)
    assert float(moments.e[1]) == pytest.approx(y[:, 1].sum(), rel=1e-9)
    weight, bias = augmented(x - x.mean(0), y, penalty(x, RIDGES[0], True), True)
    np.testing.assert_allclose(change.weight.numpy(), weight, rtol=0, atol=1e-5 * np.abs(weight).max())
    np.testing.assert_allclose(change.bias.numpy(), bias - x.mean(0) @ weight, rtol=1e-5, atol=1e-5 * np.abs(bias).max())
    assert moments.error(change) == pytest.approx(squares(r, e, change), rel=1e-4)


@biased_or_not
def test_features_that_never_fire(biased: bool) -> None:
    """They get no weight and take none from the others; with none that fires, what is left is the bias."""
    r, e = rows(200, 12, 5)
    r[:, 4:] = 0.0
    change = solve(gathered(r, e), "least_squares", biased=biased)
    assert change.weight is not None
    assert not change.weight[4:].any()
    weight, _ = augmented(r.numpy()[:, :4], e.numpy(), penalty(r.numpy(), 0.01, biased), biased)
    np.testing.assert_allclose(change.weight[:4].numpy(), weight, rtol=1e-7, atol=1e-9)
    dead = gathered(torch.zeros_like(r), e)
    change = solve(dead, "least_squares", biased=biased)
    assert change.weight is not None
    assert not change.weight.any()
    np.testing.assert_allclose(change.bias.numpy(), e.numpy().mean(0) if biased else np.zeros(5), rtol=1e-12)
    assert effective_rank(dead, 0.01, biased) == pytest.approx(0.0, abs=1e-9)


@biased_or_not
@pytest.mark.parametrize(("n", "d"), [(300, 12), (20, 40)], ids=str)
def test_effective_rank(n: int, d: int, biased: bool) -> None:
    """Σ λ / (λ + ρ) over the eigenvalues of the features' covariance (second moments without a bias)."""
    r, e = rows(n, d, 2)
    x = r.numpy() - (r.numpy().mean(0) if biased else 0.0)
    values = np.linalg.eigvalsh(x.T @ x / n).clip(0)
    ranks = []
    for ridge in RIDGES:
        ranks.append(effective_rank(gathered(r, e), ridge, biased))
        assert ranks[-1] == pytest.approx(float((values / (values + ridge * values.mean())).sum()), rel=1e-9)
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] < min(n, d)


@biased_or_not
@pytest.mark.parametrize("method", ["none", "bias", "least_squares"])
def test_choose(method: str, biased: bool) -> None:
    """The candidate up to the method with the least error on the held-out rows, each one solved and judged here."""
    fit, held_out = rows(60, 12, 5, noise=1.0), rows(31, 12, 5, seed=1, noise=1.0)
    scale = torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0])
    sums = gathered(*fit), gathered(*held_out)
    change, before, after = choose(*sums, method, biased=biased, scale=scale)  # type: ignore[arg-type]
    (x, y), (hx, hy) = ([t.numpy() for t in pair] for pair in (fit, held_out))
    factor = scale.double().numpy()
    errors = {("none", None): np.square(hy * factor).sum()}
    if method != "none" and biased:
        errors[("bias", None)] = np.square((hy - y.mean(0)) * factor).sum()
    for ridge in RIDGES if method == "least_squares" else ():
        weight, bias = augmented(x, y, penalty(x, ridge, biased), biased)
        errors[("least_squares", ridge)] = np.square((hy - hx @ weight - bias) * factor).sum()
    best = min(errors, key=errors.__getitem__)
    assert (change.method, change.ridge) == best
    assert before == pytest.approx(errors[("none", None)], rel=1e-9)
    assert after == pytest.approx(errors[best], rel=1e-9)
    ax, ay = np.vstack([x, hx]), np.vstack([y, hy])
    if best[0] == "least_squares":  # solved again from all rows
        weight, bias = augmented(ax, ay, penalty(ax, best[1], biased), biased)
        assert change.weight is not None
        np.testing.assert_allclose(change.weight.numpy(), weight, rtol=1e-7, atol=1e-9)
        assert best[1] > RIDGES[0]  # with so much noise
    else:
        assert change.weight is None
        bias = ay.mean(0) if best[0] == "bias" else np.zeros(5)
    np.testing.assert_allclose(change.bias.numpy(), bias, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("turned", "noise", "wanted"),
    [("all", 0.0, "none"), ("slopes", 0.0, "bias"), ("", 0.0, "least_squares"), ("", 30.0, "none")],
)
def test_choose_falls_back(turned: str, noise: float, wanted: str) -> None:
    """Held-out rows that contradict the slope make "bias" win, those that contradict the mean too, or much noise, "none"."""
    r, e = rows(100, 12, 5, noise=0.0)
    e = e + noise * torch.randn(e.shape, generator=torch.Generator().manual_seed(0), dtype=e.dtype)
    held, other = rows(100, 12, 5, seed=1, noise=0.0)
    if turned == "all":
        other = -other
    elif turned == "slopes":
        other = 2 * other.mean(0) - other
    change, before, after = choose(gathered(r, e), gathered(held, other), "least_squares")
    assert change.method == wanted
    assert after < before or wanted == "none"
    assert before == pytest.approx(float(other.square().sum()))
    assert wanted != "none" or (after == before and change.weight is None and not change.bias.any())
    assert wanted != "least_squares" or change.ridge == RIDGES[0]
