"""Settings of the robustness study on a toy task; its tables and the figures against scipy and the rows themselves."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from support.toy_study import TASK

import hf_lambda_gelu as hlg
from scripts.studies import figures, robustness, updates
from scripts.studies import run as study
from scripts.studies.recipes.hardening import PAPER_START
from scripts.studies.recipes.recipe import Result, Run
from scripts.tools.tables import append

SHORT = replace(TASK, train=64, epochs=1)  # two steps, of which the first is the warm-up's, at a rate of 0


def run(setting: str) -> Result:
    train, test = SHORT.splits(0, "test")
    (found,) = robustness.SETTINGS[setting](Run(SHORT, 0, 1e-2, train, test)).items()
    assert found[0] == setting
    return found[1]


@pytest.mark.parametrize("setting", sorted(robustness.SETTINGS))
def test_settings_end_in_a_relu_network(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged last has ReLU; what is learned is λ ≥ 1 of each layer, and every setting of the plan is there."""
    judged = []
    monkeypatch.setattr(Run, "judge", lambda run, model: judged.append(model) or {"accuracy": 0.0, "loss": 0.0})
    result = run(setting)
    x = torch.linspace(-3, 3, 101)[:, None].expand(-1, 16)
    assert not hlg.hardness_sites(judged[-1])
    assert all(torch.equal(activation.eval()(x), x.relu()) for activation in judged[-1].activations)
    assert len(result.profile) == 3
    assert min(result.profile) >= 1.0
    assert all(setting in robustness.SETTINGS for settings, _ in robustness.PLAN.values() for setting in settings)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_steps_of_s_move_the_hardness_by_the_temperature(temperature: float) -> None:
    """AdamW's step does not know the scale of a gradient: one on s moves λ by σ/t times what one on λ does."""
    moved = np.subtract(run(f"t_{temperature:g}").profile, PAPER_START)
    meant = np.subtract(run("unhardened").profile, PAPER_START)
    sigma = 1.0 - math.exp(-(PAPER_START - 1.0))  # σ(s/t) where softplus(s/t) = λ − 1
    assert np.abs(meant).min() > 1e-4
    assert moved / meant == pytest.approx([sigma / temperature] * 3, rel=0.05)


@pytest.mark.parametrize(("setting", "factor"), [("rate_0.0033", 1 / 3), ("rate_0.03", 3.0)])
def test_rates_scale_the_step(setting: str, factor: float) -> None:
    moved, meant = np.subtract(run(setting).profile, PAPER_START), np.subtract(run("unhardened").profile, PAPER_START)
    assert moved / meant == pytest.approx([factor] * 3, rel=0.01)


def test_likeness_is_scipys() -> None:
    """The mean of scipy's correlations over the seeds; the interval is that of scipy's bootstrap, up to the draws."""
    generator = np.random.default_rng(1)
    first = generator.standard_normal((9, 6)) + np.arange(6)
    second = first + generator.standard_normal((9, 6))
    found = [stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    mean, low, high = robustness.likeness(first.tolist(), second.tolist())
    expected = stats.bootstrap((found,), np.mean, method="percentile", n_resamples=20_000).confidence_interval
    assert mean == pytest.approx(np.mean(found))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert robustness.likeness([[1.0, 2.0, 3.0]] * 2, [[3.0, 2.0, 1.0]] * 2) == pytest.approx((-1.0, -1.0, -1.0))


def row(setting: str, seed: int, accuracy: float, before: float, profile: str, split: str = "test") -> dict[str, object]:
    shown = {"accuracy": accuracy, "before": before, "profile": profile}
    return {"task": "segment", "recipe": setting, "seed": seed, "split": split, **shown}


def test_tables_pair_by_seed(tmp_path: Path) -> None:
    """A seed that only one of two settings has is left out of what compares them; trials of a rate are in no table."""
    results = tmp_path / "robustness.csv"
    made = [row("unhardened", seed, 0.9, 0.9, "3 2 1") for seed in (0, 1)]
    made += [row("start_1", seed, 0.0, 0.92, learned) for seed, learned in enumerate(("2 1.5 1", "1 1.5 2", "1 2 3"))]
    made += [row("paper", 0, 0.90, 0.90, ""), row("paper", 1, 0.80, 0.80, "")]
    made += [row("hold_0", 0, 0.91, 0.93, ""), row("hold_0", 1, 0.84, 0.84, ""), row("hold_0", 2, 0.10, 0.90, "")]
    made += [row("start_1", 3, 0.0, 0.0, "9 9 9", "validation"), row("hold_0", 3, 0.0, 0.9, "", "validation")]
    append(results, study.FIELDS, made)
    rows = robustness.judged_rows(results)
    reference, start = robustness.profiles(rows).splitlines()[2:]
    assert reference == "| segment | reference | 2 | 3.00 2.00 1.00 | +1.00 (+1.00 to +1.00) |  |  |"
    assert start.startswith("| segment | λ₀ = 1 | 3 | 1.33 1.67 2.00 | −0.33 (")
    assert start.endswith("| +0.00 (−1.00 to +1.00) | +2.0 ± 0.0 |")
    paper, hold = robustness.accuracies(rows).splitlines()[2:4]
    assert paper == "| ramped: reference | +0.0 ± 0.0 |  |"
    assert hold.startswith("| ramped: hold 0 | −27.3 ± ")  # (−2 + 0 − 80) / 3
    assert hold.split("|")[3].strip().startswith("+2.5 ± ")  # (1 + 4) / 2


# ------------------------------------------------------------------------------------------------------------------ figures


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def judged(task: str, recipe: str) -> list[dict[str, str]]:
    return [r for r in rows_of(study.RESULTS) if (r["task"], r["recipe"], r["split"]) == (task, recipe, "test")]


def lines(figure: Figure, panel: int, marker: str) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in figure.axes[panel].lines if line.get_marker() == marker]


def test_bands_are_t_intervals() -> None:
    values = np.random.default_rng(0).standard_normal((5, 3))
    mean, half = figures.bands(values)
    for column, m, h in zip(values.T, mean, half, strict=True):
        expected = stats.ttest_1samp(column, 0.0).confidence_interval(0.95)
        assert (m - h, m + h) == pytest.approx((expected.low, expected.high))
    assert figures.bands(values[:1])[1].tolist() == [0.0] * 3


def test_profiles_show_the_rows() -> None:
    """The first panel is the MLP's: its mean, and a line a seed."""
    figure = figures.profiles()
    learned = np.array([[float(x) for x in r["profile"].split()] for r in judged("segment", "unhardened")])
    assert figure.axes[0].get_title().endswith(f"{len(learned)} seeds")
    (mean,) = lines(figure, 0, "o")
    assert mean == pytest.approx(learned.mean(0))
    assert np.array([line.get_ydata() for line in figure.axes[0].lines[: len(learned)]]) == pytest.approx(learned)


def test_accuracies_show_the_rows() -> None:
    """The second panel is the ViT's: before the substitution and after it, from the hardest ramp to none."""
    figure = figures.tolerance()
    recipes = ("paper", "tolerance_0.025", "tolerance_0.1", "tolerance_0.4", "unhardened")
    for column, marker in (("before", "o"), ("accuracy", "s")):
        (drawn,) = lines(figure, 1, marker)
        assert drawn == pytest.approx([100 * np.mean([float(r[column]) for r in judged("digits", x)]) for x in recipes])


def test_steps_show_the_rows() -> None:
    """The last panel is SGD's from the paper's λ₀: four layers by the naive update, then four by the aware one."""
    drawn = [np.asarray(line.get_ydata()) for line in figures.steps().axes[3].lines[:8]]
    found = []
    for update in ("naive", "aware"):
        chosen = ("sgd", update, "1.693", "0")
        trace = [r for r in rows_of(updates.RESULTS) if (r["optimizer"], r["update"], r["start"], r["seed"]) == chosen]
        found += list(np.array([[float(x) for x in r["hardness"].split()] for r in trace]).T)
    assert np.array(drawn) == pytest.approx(np.array(found))


def test_the_command_writes_each_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins: dict[str, Callable[[bytes], bool]] = {
        "pdf": lambda data: data.startswith(b"%PDF"),
        "svg": lambda data: b"<svg" in data[:1000],
        "png": lambda data: data.startswith(b"\x89PNG"),
    }
    for suffix, only in (("pdf", "tolerance"), ("svg", "recipes"), ("png", "profiles")):
        monkeypatch.setattr("sys.argv", ["figures", "--folder", str(tmp_path), "--suffix", suffix, "--only", only])
        figures.main()
        assert begins[suffix]((tmp_path / f"{only}.{suffix}").read_bytes())
