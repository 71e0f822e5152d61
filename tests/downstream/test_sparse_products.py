"""The kernel that reads firing rows alone, against numpy in float64, whatever the sizes, zeros, dtype and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lambda_gelu.downstream import crossover, sparse_products
from hf_lambda_gelu.downstream.crossover import firing

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SIZES = [(1, 1), (7, 5), (37, 32), (128, 33), (1000, 257), (64, 5000), (3000, 768)]


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def drawn(n: int, k: int, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What fires (1, n), a matrix (n, k), a bias of each width."""
    generator = torch.Generator().manual_seed(n + k)
    h = firing(n, share, dtype, generator)
    return h, *(torch.randn(size, generator=generator).to(dtype) for size in ((n, k), (k,), (n,)))


def check(got: Tensor | None, expected: np.ndarray, size: np.ndarray, terms: int) -> None:
    """`size` is the sum of magnitudes, by which fp32 sums are off; the result is rounded once."""
    assert got is not None
    bound = EPS[torch.float32] * (terms + 2) * size + EPS[got.dtype] * abs(expected)
    assert (abs(numbers(got).reshape(-1) - expected) <= bound).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", sparse_products.DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_both_products(n: int, k: int, dtype: torch.dtype, share: float) -> None:
    h, w, wide, tall = drawn(n, k, dtype, share)
    for bias in (None, wide):
        b = 0.0 if bias is None else numbers(bias)
        expected, size = numbers(h)[0] @ numbers(w) + b, abs(numbers(h)[0]) @ abs(numbers(w)) + abs(b)
        check(sparse_products.gathered(h, w, bias, n), expected, size, n)
    x = torch.randn(1, 1, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    fires = numbers(h)[0] != 0
    for bias in (None, tall):
        b = 0.0 if bias is None else numbers(bias)
        expected, size = numbers(w) @ numbers(x)[0, 0] + b, abs(numbers(w)) @ abs(numbers(x)[0, 0]) + abs(b)
        got = sparse_products.chosen(h, x, w, bias, n)
        assert got is not None
        assert got.shape == (1, 1, n)
        check(got, np.where(fires, expected, 0.0), size, k)
        assert not got[0, 0, torch.from_numpy(~fires)].any()


@pytest.mark.parametrize("dtype", sparse_products.DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    h, w, wide, tall = drawn(2000, 700, dtype, 0.5)
    x = torch.randn(1, 700).to(dtype)
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append((sparse_products.gathered(h, w, wide, 2000), sparse_products.chosen(h, x, w, tall, 2000)))
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_more_than_pays_is_left_alone() -> None:
    h = torch.tensor([[0.0, 1.0, -2.0, 0.0, 3.0]])
    w, x = torch.ones(5, 4), torch.ones(1, 4)
    assert sparse_products.gathered(h, w, None, 2) is None
    assert sparse_products.chosen(h, x, w, None, 2) is None
    assert torch.equal(sparse_products.gathered(h, w, None, 3), torch.full((1, 4), 2.0))
    assert torch.equal(sparse_products.chosen(h, x, w, None, 3), torch.tensor([[0.0, 4.0, 4.0, 0.0, 4.0]]))


def test_nan_and_infinity_come_through() -> None:
    h = torch.tensor([[0.0, torch.nan, 0.0], [0.0, torch.inf, 0.0]])
    for row, test in zip(h, (torch.isnan, torch.isposinf), strict=True):
        assert test(sparse_products.gathered(row[None], torch.ones(3, 4), None, 3)).all()
    chosen = sparse_products.chosen(h[:1], torch.ones(1, 4), torch.ones(3, 4), None, 3)
    assert torch.equal(chosen, torch.tensor([[0.0, 4.0, 0.0]]))


@pytest.mark.parametrize(
    ("dense", "low", "high", "most"),
    [
        (30.0, 10.0, 50.0, 0.3),  # 0 + 100 · share
        (300.0, 10.0, 50.0, 1.0),
        (5.0, 15.0, 55.0, 0.0),
        (20.0, 10.0, 10.0, 1.0),  # no slower with more rows: as on a warm cache
        (5.0, 10.0, 10.0, 0.0),
    ],
)
def test_crossover(dense: float, low: float, high: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line through the two times of the kernel meets the dense one; a slow call now and then does not count."""
    times = {"dense": dense, 0.1: low, 0.5: high}
    ran: list[object] = []
    monkeypatch.setattr(crossover, "_timed", lambda run: times[run()] * (20 if len(ran) % 10 == 0 else 1))  # type: ignore[index]

    def kernel(share: float) -> Tensor:
        ran.append(share)
        return share  # type: ignore[return-value]

    found = crossover.crossover([lambda: "dense"] * 3, [kernel] * 3)  # type: ignore[list-item, return-value]
    assert found.most == pytest.approx(most)
    assert (found.dense, found.at_tenth) == (dense * 1e6, low * 1e6)


def test_firing() -> None:
    row = firing(10_000, 0.1, torch.bfloat16, torch.Generator().manual_seed(0))
    assert row.shape == (1, 10_000)
    assert 900 < int((row != 0).sum()) < 1100
