"""`plot_hardness`: what is read of a run's folder, and what is drawn of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.training import SITES, converted, trained

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.plots import hardness_figure
from hf_lambda_gelu.measurement.run_history import read_run, relu_gaps, traces

NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hlg.LambdaGELUTrainer]:
    folder = tmp_path_factory.mktemp("run")
    changes = {"max_steps": 8, "hardness_switch_point": 0.5, "save_strategy": "steps", "save_steps": 2}
    return folder, trained(converted(hardness=1.5), folder, eval_strategy="steps", eval_steps=2, **changes)


def test_the_folder_of_a_run_and_of_a_checkpoint(run: tuple[Path, hlg.LambdaGELUTrainer], tmp_path: Path) -> None:
    """The newest state, with λ as learned; a checkpoint's own, where that is asked for; a damaged one is left out."""
    folder, trainer = run
    path = hlg.plot_hardness(folder)
    assert path == folder / "hardness.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] > 3 * 600, "three panels"
    read = read_run(folder)
    assert (read.step, read.learned) == (8, trainer.learned_hardness)
    assert traces(read.history) == traces(trainer.state.log_history)
    earlier = read_run(folder / "checkpoint-2")
    assert (earlier.step, dict(earlier.learned)) == (2, {})
    assert earlier.last == {site: entry[1][1] for site, entry in traces(trainer.state.log_history).items()}
    assert hlg.plot_hardness(str(folder / "checkpoint-2"), tmp_path / "early.png").is_file()
    assert hlg.plot_hardness(trainer.state.log_history, tmp_path / "history.png").is_file()
    trainer.save_state()
    assert len(read_run(folder).history) == len(trainer.state.log_history) > len(read.history)
    assert read_run(folder).learned == trainer.learned_hardness
    (folder / "trainer_state.json").unlink()
    (folder / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8, "log_hist')
    assert read_run(folder).step == 6


def test_what_is_drawn(run: tuple[Path, hlg.LambdaGELUTrainer]) -> None:
    history = run[1].state.log_history
    learned = run[1].learned_hardness
    figure = hardness_figure(learned, history, "title")
    profile, steps, gap = figure.axes
    assert [bar.get_height() + bar.get_y() for bar in profile.patches] == pytest.approx(list(learned.values()))
    lines = {line.get_label(): line for line in steps.lines}
    assert list(lines["site 1"].get_xdata()) == list(range(1, 9))
    assert list(lines["site 1"].get_ydata()) == [e[f"hardness/{SITES[1]}"] for e in history if f"hardness/{SITES[1]}" in e]
    assert steps.get_yscale() == "log"
    evaluations = [entry for entry in history if "eval_loss" in entry]
    drawn = next(line for line in gap.lines if line.get_label() == "loss")
    assert list(drawn.get_xdata()) == [2, 4, 6, 8]
    assert list(drawn.get_ydata()) == [entry["eval_relu_loss"] - entry["eval_loss"] for entry in evaluations]
    assert {axes.get_title() for axes in figure.axes} == {"title", "λ over training", "ReLU gap over training"}


def test_gaps_of_several_evaluation_sets() -> None:
    entry = {"eval_a_loss": 1.0, "eval_a_relu_loss": 1.5, "eval_a_relu_runtime": 3.0, "eval_a_runtime": 2.0, "step": 7}
    assert relu_gaps([entry, {"loss": 1.0, "step": 8}]) == {"a_loss": [(7, 0.5)]}


@pytest.mark.parametrize("sites", [1, 2, 12, 48, 80])
def test_nothing_overlaps(sites: int) -> None:
    """Neither titles nor ticks nor labels, at any depth."""
    profile = {f"layer {i}": 1 + i / sites for i in range(sites)}
    history: list[dict[str, Any]] = [
        {"step": step, **{f"hardness/{name}": value * factor for name, value in profile.items()}}
        for step, factor in ((10, 1.0), (200000, 90.0))
    ]
    history.append({"step": 200000, "eval_loss": 1.0, "eval_relu_loss": 1.000001})
    figure = hardness_figure(profile, history, "λ as learned, at the switch (step 100000)")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))
    assert boxes[0].x0 >= 0
    assert boxes[-1].x1 <= figure.bbox.x1
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [t.label1.get_window_extent(renderer) for t in axes.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        assert all(a.x1 <= b.x0 for a, b in pairwise(ticks))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("missing",), ValueError, "'missing' is no folder"),
        (("empty",), ValueError, "holds no trainer_state.json that can be read.*it has nothing"),
        (("stock",), ValueError, "there is no λ in 'stock': 1 log entries"),
        (([{"step": 1, "loss": 1.0}], "x.png"), ValueError, "there is no λ in this history"),
        (({}, "x.png"), ValueError, "profile is empty"),
        (({"a": 1.0},), ValueError, "path is missing"),
        (("stock", "x.png", [{"step": 1}]), ValueError, "history is that of the folder"),
        ((3, "x.png"), TypeError, "got int"),
        (([1.0, 2.0], "x.png"), TypeError, "got list"),
    ],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("stock").mkdir()
    Path("stock", "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": [{"step": 1, "loss": 1.0}]}))
    with pytest.raises(error, match=message):
        hlg.plot_hardness(*arguments)
    assert not list(tmp_path.rglob("*.png"))
