"""Where hinges lie, against brute force in numpy on the samples themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lambda_gelu.surgery.hinges import placement
from hf_lambda_gelu.surgery.hinges.placement import Histogram, Places, place
from hf_lambda_gelu.surgery.hinges.widening import spent

CPU = torch.device("cpu")


def samples(count: int = 4000) -> Tensor:
    """Five neurons: usual, narrow, far right, far left, two heaps."""
    torch.manual_seed(0)
    z = torch.randn(count, 5) * torch.tensor([1.0, 0.3, 0.5, 0.4, 0.3]) + torch.tensor([-0.3, -0.2, 1.5, -2.0, 1.0])
    z[: count // 2, 4] -= 2.5
    return z[torch.randperm(count)]


def placed(z: Tensor, most: int, hardness: Tensor | float = 1.0, weight: Tensor | None = None, **options: bool) -> Places:
    histogram = Histogram(z.shape[1], hardness, CPU)
    for part in range(0, len(z), 1000):
        histogram.add(z[part : part + 1000], None if weight is None else weight[part : part + 1000])
    assert histogram.rows == len(z)
    return place(histogram, F.silu, most, **options)


def error(z: np.ndarray, wanted: np.ndarray, at: np.ndarray, shifted: bool, weight: np.ndarray) -> float:
    """Of the best weights, by numpy's own least squares."""
    features = np.maximum(z[:, None] - at, 0.0)
    if shifted:
        features = np.concatenate([features, np.ones((len(z), 1))], axis=1)
    root = np.sqrt(weight)
    solution = np.linalg.lstsq(features * root[:, None], wanted * root, rcond=None)[0]
    return float((weight * (features @ solution - wanted) ** 2).sum() / weight.sum())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_brute_force(shifted: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One and two hinges err little more on the samples than the best of all pairs of a fine grid: candidates are few."""
    monkeypatch.setattr(placement, "_TAIL", 1e-7)  # what is put everywhere is no part of the samples
    z = samples()
    weight = torch.rand_like(z).square() + 0.1 if weighted else None
    found = placed(z, 2, weight=weight, shifted=shifted)
    wanted = F.silu(z).double().numpy()
    grid = np.linspace(-4.0, 3.0, 36)
    for neuron in range(z.shape[1]):
        x = z[::8, neuron].double().numpy()
        y = wanted[::8, neuron]
        w = np.ones_like(x) if weight is None else weight[::8, neuron].double().numpy()
        for number in (1, 2):
            best = min(error(x, y, np.array(at), shifted, w) for at in itertools.combinations(grid, number))
            sums = found.weights[number][neuron].numpy() * np.maximum(x[:, None] - found.at[number][neuron].numpy(), 0.0)
            given = float((w * (sums.sum(1) + float(found.shift[number][neuron]) - y) ** 2).sum() / w.sum())
            assert given <= 1.8 * best + 5e-5, (neuron, number, given, best)
    if not shifted:
        assert all(not bool(shift.any()) for shift in found.shift.values())


def test_all_triples_of_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hinges are the best three candidates, of all triples."""
    monkeypatch.setattr(placement, "_CANDIDATES", 9)
    z = samples()
    histogram = Histogram(5, 1.0, CPU)
    histogram.add(z)
    x = placement.nodes()
    weight = placement._weight(histogram.weight, x)
    candidates = placement._candidates(weight, x, F.silu(x))
    found = place(histogram, F.silu, 4)
    y = F.silu(x).numpy()
    for neuron in range(5):
        w = weight[neuron].numpy()
        errors = {
            number: min(
                error(x.numpy(), y, np.array(at), False, w)
                for at in itertools.combinations(candidates[neuron].numpy(), number)
            )
            for number in (3, 4)
        }
        assert float(found.errors[3][neuron]) == pytest.approx(errors[3], rel=0.02, abs=1e-6)
        assert errors[4] * 0.99 <= float(found.errors[4][neuron]) <= 1.5 * errors[4] + 1e-6  # by exchanges, not by all


def test_hardness_is_a_scale() -> None:
    """f(x; λ) = f(λx; 1) / λ: at λ places are those of λx over λ, weights are the same; one λ per neuron too."""
    z = samples(2000)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    one, other = placed(z, 2), placed(z / scale, 2, scale)
    for number in (1, 2):
        assert torch.allclose(one.at[number], other.at[number] * scale.unsqueeze(1), rtol=1e-3, atol=1e-3)
        assert torch.allclose(one.weights[number], other.weights[number], rtol=1e-2, atol=1e-2)


def test_activity_has_a_price() -> None:
    """With a price on active hinges, fewer of them are active."""
    z = samples()
    active = []
    for price in (0.0, 1.0):
        histogram = Histogram(5, 1.0, CPU)
        histogram.add(z)
        at = place(histogram, F.silu, 2, activity=price).at[2]
        active.append(float((z.unsqueeze(2) > at).double().mean()))
    assert active[1] < active[0] - 0.05


def test_beyond_what_was_seen() -> None:
    """Where no sample was, two hinges are still near the gate: nothing of the fit explodes there."""
    z = samples()[:, 1:2] * 0.2  # |z| < 0.3
    found = placed(z, 2)
    x = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64).unsqueeze(1)
    sums = (found.weights[2][0] * (x - found.at[2][0]).clamp(min=0.0)).sum(1)
    assert float((sums - F.silu(x[:, 0])).abs().max()) < 1.5


def test_neurons_without_rows() -> None:
    """A unit that nothing reaches gets hinges all the same, and nothing is no number."""
    found = place(Histogram(2, 1.0, CPU), F.silu, 3)
    assert all(bool(torch.isfinite(t).all()) for t in (*found.at.values(), *found.weights.values()))


def test_budget_is_spent_where_it_saves_most() -> None:
    """Where each further hinge saves less than the one before, no other spending errs less; the width is what was wanted."""
    torch.manual_seed(0)
    savings = torch.rand(5, 2, dtype=torch.float64).sort(1, descending=True).values
    errors = 3.0 - torch.cat([torch.zeros(5, 1), savings.cumsum(1)], dim=1)
    gain = torch.rand(5, dtype=torch.float64) + 0.1
    some = {n: torch.zeros(5, n, dtype=torch.float64) for n in (1, 2, 3)}
    found = Places(some, some, {n: torch.zeros(5) for n in some}, {n: errors[:, n - 1] for n in some})
    for units in range(5, 16):
        hinges = spent(found, gain, units)
        counts = torch.bincount(hinges.neuron, minlength=5)
        assert (int(counts.sum()), int(counts.min()) >= 1) == (units, True)
        assert bool((hinges.neuron.diff() >= 0).all())
        cost = float((errors.gather(1, counts.unsqueeze(1) - 1)[:, 0] * gain).sum())
        every = [torch.tensor(c) for c in itertools.product((1, 2, 3), repeat=5) if sum(c) == units]
        best = min(float((errors.gather(1, c.unsqueeze(1) - 1)[:, 0] * gain).sum()) for c in every)
        assert cost == pytest.approx(best)
