"""`verify_robustness`: verdicts against a fine grid, counterexamples, what cannot be decided and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.verified import as_module, digits, digits_network, random_network
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.verification import robustness, solvers
from hf_lambda_gelu.downstream.verification.balls import balls
from hf_lambda_gelu.downstream.verification.network import read_network

SIDE = torch.linspace(-1.0, 1.0, 301, dtype=torch.float64)
GRID = torch.cartesian_prod(SIDE, SIDE)  # of the square about an input


def two_inputs(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network on the plane, points, and the classes that it gives them."""
    model = as_module(random_network(np.random.default_rng(seed), 2, 8, 8, 3, scale=1.6))
    points = torch.from_numpy(np.random.default_rng(seed + 100).standard_normal((6, 2)))
    return model, points, model(points).argmax(1)


@pytest.mark.parametrize("solver", ["highs", "auto"])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_grid(seed: int, solver: str) -> None:
    """Robust: the label wins at all 90,601 points. Refuted: at the counterexample, in the ball, it does not."""
    model, points, labels = two_inputs(seed)
    epsilon = 0.4
    report = hlg.verify_robustness(model, points, labels, epsilon, solver=solver)
    for point, label, verdict in zip(points, labels.tolist(), report.verdicts, strict=True):
        logits = model(point + epsilon * GRID)
        rest = logits.clone()
        rest[:, label] = -torch.inf
        margin = (logits[:, label] - rest.amax(1)).min()
        assert verdict.verdict == ("robust" if margin > 0.0 else "refuted")
        if verdict.verdict == "robust":
            assert verdict.margin <= margin
        else:
            assert verdict.counterexample is not None
            assert (verdict.counterexample - point).abs().max() <= epsilon
            assert int(model(verdict.counterexample[None]).argmax()) == verdict.other != label
    assert report.counts["unknown"] == report.counts["timeout"] == 0


def test_the_grid_sees_both_verdicts_and_all_ways() -> None:
    """So the test above is one of all that decides."""
    found = set()
    for seed in range(4):
        report = hlg.verify_robustness(*two_inputs(seed), 0.4, solver="highs")
        found |= {(verdict.verdict, verdict.decided_by) for verdict in report.verdicts}
    assert found >= {("robust", "intervals"), ("robust", "linear bounds"), ("robust", "highs"), ("refuted", "search")}


def test_solvers_agree_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search is left out, so that counterexamples are the solvers' own; each is confirmed, in [0, 1]."""
    images, labels = digits()
    model = digits_network(16, 16)
    monkeypatch.setattr(robustness.Replay, "searched", lambda *_: None)
    names = [name for name, (package, _) in solvers.SOLVERS.items() if solvers.find_spec(package) is not None]
    reports = [
        hlg.verify_robustness(model, images[1500:1512], labels[1500:1512], 0.03, clip=(0.0, 1.0), solver=name)
        for name in names
    ]
    assert len({tuple(verdict.verdict for verdict in report.verdicts) for report in reports}) == 1
    for report in reports:
        assert report.counts["robust"] + report.counts["refuted"] == 12
        by_solver = [v for v in report.verdicts if v.verdict == "refuted" and v.decided_by == report.solver]
        assert by_solver
        for verdict in by_solver:
            x = verdict.counterexample
            assert x is not None
            assert x.dtype == torch.float64
            assert 0.0 <= x.min() <= x.max() <= 1.0
            logits = copy.deepcopy(model).double()(x[None])[0]
            assert logits[verdict.other] > logits[verdict.label]
            assert verdict.agrees_in_own_dtype


def test_flattened_images_and_labels_as_a_list() -> None:
    images, labels = digits()
    plain = hlg.verify_robustness(digits_network(16, 16), images[1500:1504], labels[1500:1504], 0.02)
    model = nn.Sequential(nn.Flatten(), digits_network(16, 16)).eval()
    report = hlg.verify_robustness(model, images[1500:1504].reshape(-1, 1, 8, 8), labels[1500:1504].tolist(), 0.02)
    assert [v.verdict for v in report.verdicts] == [v.verdict for v in plain.verdicts]
    assert {v.counterexample.shape for v in report.verdicts if v.counterexample is not None} <= {(1, 8, 8)}


def test_wrong_without_any_change() -> None:
    model, points, labels = two_inputs(0)
    (verdict,) = hlg.verify_robustness(model, points[:1], (labels[:1] + 1) % 3, 0.1).verdicts
    assert (verdict.verdict, verdict.decided_by, verdict.other) == ("refuted", "the input itself", int(labels[0]))
    assert torch.equal(verdict.counterexample, points[0])


def absolute(least: float) -> nn.Sequential:
    """Logits 2 ReLU(x) − ReLU(x + 10) + 10 + least and 0: for x ≥ −10 the margin is |x| + least, which bounds do not see."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    values = [[[1.0], [1.0]], [0.0, 10.0], [[2.0, -1.0], [0.0, 0.0]], [10.0 + least, 0.0]]
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = torch.tensor(value, dtype=torch.float64)
    return model


@pytest.mark.parametrize("solver", ["highs", "auto"])
@pytest.mark.parametrize(
    ("least", "expected"), [(1e-3, "robust"), (1e-8, "unknown"), (0.0, "unknown"), (-1e-12, "refuted"), (-1e-3, "refuted")]
)
def test_within_tolerances_nothing_is_said(
    least: float, expected: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solvers err by some 1e-9: a margin within 1e-6 of the logits' size is not robust, and refuted by torch alone."""
    monkeypatch.setattr(robustness.Replay, "searched", lambda *_: None)
    point = torch.full((1, 1), 0.3, dtype=torch.float64)
    (verdict,) = hlg.verify_robustness(absolute(least), point, [0], 0.7, solver=solver).verdicts
    assert verdict.verdict == expected
    assert ("that torch does not confirm" in verdict.reason) == (expected == "unknown")


def test_where_rounding_decides_nothing_is_refuted() -> None:
    """10¹⁶ + 1 − 10¹⁶ against 0.5: float64 computes 0, and another class; without rounding it is 1, and the label."""
    model = nn.Sequential(nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e16, 1.0, -1e16], [0.0, 0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.5]))
    point = torch.ones(1, 3, dtype=torch.float64)
    assert model(point).argmax() == 1
    (verdict,) = hlg.verify_robustness(model, point, [0], 1e-20).verdicts
    assert verdict.verdict == "unknown"
    assert verdict.counterexample is None


def test_bounds_that_overflow_prove_nothing() -> None:
    """Logits 1e400 ReLU(x) − 1e400 ReLU(−x) + 1 and 0: the margin is below zero for x < 0, and float64 computes NaN."""
    model = absolute(0.0)
    weights = [[[1e200], [-1e200]], [0.0, 0.0], [[1e200, -1e200], [0.0, 0.0]], [1.0, 0.0]]
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data = torch.tensor(value, dtype=torch.float64)
    (verdict,) = hlg.verify_robustness(model, torch.zeros(1, 1, dtype=torch.float64), [0], 0.1).verdicts
    assert verdict.verdict == "unknown"
    assert "float64 overflows in the bounds" in verdict.reason


def test_balls() -> None:
    """The inner one is in the exact ball and the outer one around it, also where ± ε rounds."""
    from fractions import Fraction

    generator = np.random.default_rng(0)
    x, epsilon = generator.standard_normal(500).clip(-2.0, 2.0), 0.1
    outer, inner = balls(x, epsilon, (-2.0, 2.0))
    for low, inside, centre, top, high in zip(outer.lower, inner.lower, x, inner.upper, outer.upper, strict=True):
        least = max(Fraction(float(centre)) - Fraction(epsilon), Fraction(-2))
        most = min(Fraction(float(centre)) + Fraction(epsilon), Fraction(2))
        assert Fraction(float(low)) <= least <= Fraction(float(inside)) <= Fraction(float(centre))
        assert Fraction(float(centre)) <= Fraction(float(top)) <= most <= Fraction(float(high))


def test_the_model_is_left_as_it_was() -> None:
    images, labels = digits()
    model = copy.deepcopy(digits_network(16, 16)).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    hlg.verify_robustness(model.train(), images[1500:1502], labels[1500:1502], 0.02)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_in_contexts_without_gradients(context: Any) -> None:
    images, labels = digits()
    expected = hlg.verify_robustness(digits_network(16, 16), images[1500:1506], labels[1500:1506], 0.03)
    with context():
        model = copy.deepcopy(digits_network(16, 16))
        report = hlg.verify_robustness(model, images[1500:1506] * 1.0, labels[1500:1506], 0.03)
    assert [v.decided_by for v in report.verdicts] == [v.decided_by for v in expected.verdicts]
    assert report.counts["refuted"] > 0


# ------------------------------------------------------------------------------------- solvers that do not do as they should


def undecided_by_bounds() -> tuple[nn.Sequential, Tensor, Tensor, float]:
    """Two digits that a solver finds robust."""
    images, labels = digits()
    model = digits_network(16, 16)
    chosen = [
        v.index
        for v in hlg.verify_robustness(model, images[1500:1540], labels[1500:1540], 0.05, solver="highs").verdicts
        if (v.verdict, v.decided_by) == ("robust", "highs")
    ]
    rows = [1500 + i for i in chosen[:2]]
    assert len(rows) == 2
    return model, images[rows], labels[rows], 0.05


def test_time_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = undecided_by_bounds()
    monkeypatch.setattr(solvers.SolverProcess, "_start", lambda _: pytest.fail("a solver is started for no time"))
    report = hlg.verify_robustness(*arguments, time_limit=1e-9, solver="highs")
    assert report.counts == {"robust": 0, "refuted": 0, "timeout": 2, "unknown": 0}
    assert report.verdicts[0].reason == "highs had no answer within 1e-09 s"


def test_a_solver_that_crashes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = undecided_by_bounds()
    path = tmp_path / "crashing.py"
    path.write_text("import os, signal\n\ndef solve(query, seconds):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setitem(solvers.SOLVERS, "highs", ("highspy", path))
    report = hlg.verify_robustness(*arguments, solver="highs")
    assert report.counts["unknown"] == 2
    assert report.verdicts[0].reason == "highs crashed: its process ended by SIGKILL"
    assert "input 0: unknown: highs crashed: its process ended by SIGKILL" in str(report)


def test_a_crash_for_one_class_is_not_robust_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of "none" for the other classes do not hide it."""
    arguments = undecided_by_bounds()
    path = tmp_path / "flaky.py"
    path.write_text(
        "calls = []\n\ndef solve(query, seconds):\n    calls.append(0)\n    return ('none', None) if calls[1:] else 1 / 0\n"
    )
    monkeypatch.setitem(solvers.SOLVERS, "highs", ("highspy", path))
    first, second = hlg.verify_robustness(*arguments, solver="highs").verdicts
    assert (first.verdict, first.reason) == ("unknown", "ZeroDivisionError: division by zero")
    assert second.verdict == "robust"


def test_a_solver_that_lies_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it calls a counterexample is run by torch."""
    arguments = undecided_by_bounds()
    path = tmp_path / "lying.py"
    path.write_text("def solve(query, seconds):\n    return 'found', (query['box'][0] + query['box'][1]) / 2\n")
    monkeypatch.setitem(solvers.SOLVERS, "highs", ("highspy", path))
    report = hlg.verify_robustness(*arguments, solver="highs")
    assert report.counts["unknown"] == 2
    assert "highs found a point that torch does not confirm" in report.verdicts[0].reason


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon must be a finite number > 0, the radius .* got 0\.0"),
        ({"epsilon": -0.1}, r"epsilon must be .* got -0\.1"),
        ({"epsilon": float("nan")}, "epsilon must be .* got nan"),
        ({"epsilon": float("inf")}, "epsilon must be .* got inf"),
        ({"time_limit": 0.0}, r"time_limit must be a number of seconds > 0 for each input, got 0\.0"),
        ({"solver": "z3"}, "unknown solver 'z3'"),
        ({"clip": (1.0, 0.0)}, r"clip must be \(low, high\) with low < high, got \(1\.0, 0\.0\)"),
        ({"clip": (0.0, 0.5)}, r"inputs must be finite and in the range clip=\(0\.0, 0\.5\): they lie in \[0, 1\]"),
        ({"inputs": torch.zeros(0, 64)}, r"with one input or more, got \(0, 64\)"),
        ({"inputs": torch.zeros(2, 64, dtype=torch.long)}, r"got \(2, 64\) of torch\.int64"),
        ({"inputs": [[0.0] * 64] * 2}, "got list"),
        ({"inputs": torch.full((2, 64), float("nan"))}, "inputs must be finite"),
        ({"inputs": torch.zeros(2, 63)}, r"does not take inputs of shape \(2, 63\)"),
        ({"labels": [1]}, r"labels must be 2 whole numbers, one for each input, got shape \(1,\)"),
        ({"labels": [1.0, 2.0]}, "got shape .* of torch.float32"),
        ({"labels": [1, 10]}, "labels must be from 0 to 9, the network's outputs, got 1 to 10"),
        ({"labels": [-1, 1]}, "got -1 to 1"),
        ({"model": nn.Sequential(nn.Linear(64, 1))}, "has one output: expected the logits of two classes or more"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    images, labels = digits()
    arguments = {"model": digits_network(16, 16), "inputs": images[:2], "labels": labels[:2], "epsilon": 0.1}
    with pytest.raises(ValueError, match=message):
        hlg.verify_robustness(**{**arguments, **change})


def test_the_gelu_twin_is_refused_and_its_relu_twin_is_not() -> None:
    images, labels = digits()
    model = digits_network(16, activation=nn.GELU)
    with pytest.raises(ValueError, match="1 \\(GELU\\) is smooth, and exact solvers need piecewise-linear networks"):
        hlg.verify_robustness(model, images[1500:1502], labels[1500:1502], 0.02)
    converted = copy.deepcopy(model)
    hlg.convert(converted)
    with pytest.raises(ValueError, match="1 \\(LambdaGELU\\) is smooth"):
        hlg.verify_robustness(converted, images[1500:1502], labels[1500:1502], 0.02)
    hlg.relu_ize(converted, force=True)
    assert len(read_network(converted)) == 2
    assert len(hlg.verify_robustness(converted, images[1500:1502], labels[1500:1502], 0.02).verdicts) == 2
