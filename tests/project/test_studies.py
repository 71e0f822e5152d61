"""The study on a toy task: what its rows say is recomputed, and the statistics are those of scipy."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from scipy import stats
from support import tiny
from support.toy_study import TASK, network, splits
from support.versions import newer_transformers
from transformers import LlamaForCausalLM

import hf_lambda_gelu as hlg
from scripts.studies import claims, protocol, report, sparsity, updates
from scripts.studies import run as study
from scripts.studies.recipes import stages
from scripts.studies.recipes.recipe import RECIPES, Run
from scripts.studies.scratch import ScratchTask
from scripts.studies.tasks import FULL
from scripts.studies.training_free import distilled
from scripts.tools.tables import append, read


def test_rows_and_resuming(tmp_path: Path) -> None:
    """A run writes its rows once; the rate of a test run is the best one of the validation split."""
    results = tmp_path / "study.csv"
    for rate in TASK.rates:
        study.run(results, TASK, "gelu", study.TUNING_SEED, rate, "validation")
    trials = read(results)
    assert {row["recipe"] for row in trials} == {"gelu"}  # what follows the training is left out
    assert [(row["split"], float(row["rate"])) for row in trials] == [("validation", rate) for rate in TASK.rates]
    best = max(trials, key=lambda row: float(row["accuracy"]))
    assert study.best_rate(results, TASK, "gelu") == float(best["rate"])
    assert study.best_rate(results, TASK, "paper") == TASK.rates[0]

    for _ in range(2):
        study.run(results, TASK, "gelu", 0, TASK.rates[0], "test")
    with results.open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert [row["recipe"] for row in found] == ["gelu", "swap", "bias_after", "least_squares_after"]
    assert len({row["before"] for row in found[1:]} | {found[0]["accuracy"]}) == 1
    assert {int(row["steps"]) for row in found} == {256 // 32 * TASK.epochs}
    assert float(found[0]["accuracy"]) > 0.6


@newer_transformers("a Trainer keeps the autocast that an earlier one has left")
def test_bf16_trains_and_fp32_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer puts out is bf16 in training steps alone."""
    seen: set[tuple[bool, torch.dtype]] = set()
    train, test = TASK.splits(0, "test")
    run = Run(dataclasses.replace(TASK, epochs=1, bf16=True), 0, 1e-2, train, test)
    model = run.model()
    model.linears[0].register_forward_hook(lambda module, args, output: seen.add((module.training, output.dtype)))
    run.trainer(model).train()
    run.judge(model)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}


def test_sparsity_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is made once, and a penalty makes zeros; the table pairs each seed with its own run without a penalty."""
    monkeypatch.setattr(hlg, "save_relu_pretrained", lambda model, folder: model.save_pretrained(folder))  # of no Hub class
    results = tmp_path / "sparsity.csv"
    for norm, weight in (("none", 0.0), ("hoyer", 1.0), ("none", 0.0)):
        sparsity.run(results, TASK, norm, weight, 0)
    plain, penalised = read(results)
    assert (plain["weight"], penalised["weight"], plain["steps"]) == ("0", "1", "32")
    assert float(plain["zeros"]) + 0.05 < float(penalised["zeros"])

    rows = [{**plain, "seed": str(seed), "zeros": zeros} for seed, zeros in enumerate(("0.5", "0.6"))]
    rows += [{**penalised, "seed": str(seed), "zeros": zeros} for seed, zeros in enumerate(("0.8", "0.7", "0.9"))]
    first, second = sparsity.table(rows).splitlines()[2:]
    assert first.startswith("| toy | none | 55.0 | ")
    assert second.startswith(f"| toy | hoyer, 1 | 80.0 ({report.shown(np.array([30.0, 10.0]))}) | ")
    assert (first[-5:], second[-5:]) == ("| 2 |", "| 3 |")


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"gelu"}))
def test_recipes_end_in_a_relu_network(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged last has ReLU, or a module that computes it; all recipes see the same rows for the same steps."""
    judged = []
    monkeypatch.setattr(Run, "judge", lambda run, model: judged.append(model) or {"accuracy": 0.0, "loss": 0.0})
    train, test = TASK.splits(0, "test")
    given = Run(TASK, 0, 1e-2, train, test)
    found = RECIPES[recipe](given)
    assert set(found) == {recipe}
    model, x = judged[-1], torch.linspace(-3, 3, 101)[:, None].expand(-1, 16)
    assert not hlg.hardness_sites(model)
    for activation in model.activations:
        assert torch.equal(activation.eval()(x), x.relu())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    result = found[recipe]
    assert (result.before is None) == (not result.profile)


def test_a_stage_hardens_what_it_names() -> None:
    """The refit sees the next λ at the named sites alone; the function is kept better than by the λ alone."""
    train, test = TASK.splits(0, "test")
    run = Run(TASK, 0, 1e-2, train, test)
    model, inputs = run.model().eval(), {k: v for k, v in test[:100].items() if k != "labels"}
    hlg.convert(model)
    sites = hlg.hardness_sites(model)
    for site in sites.values():
        site.__class__ = stages._Staged
    x = torch.linspace(-3, 3, 101)
    first, *others = sites
    with torch.no_grad():
        expected = model(**inputs).logits
        sites[first].set_hardness(160.0)
        plain = (model(**inputs).logits - expected).square().mean()
        sites[first].set_hardness(1.0)
        stages._harden(run, model, {first: 160.0})
        assert hlg.hardness_profile(model) == pytest.approx({first: 160.0} | dict.fromkeys(others, 1.0), rel=1e-4)
        assert (model(**inputs).logits - expected).square().mean() < plain / 2
        with hlg.gates_as_relu(model):
            for name, site in sites.items():
                site.following = None if name == first else 8.0
                wanted = hlg.lambda_gelu_reference(x, 160.0 if name == first else 8.0)
                assert torch.allclose(site(x), wanted, atol=1e-5)


def test_draws_do_not_overlap() -> None:
    """Training examples differ by seed, and none of them is judged, with or without a validation split."""
    raw = splits()
    whole = datasets.DatasetDict(train=raw["train"], test=raw["test"])
    for made in (raw, whole):
        task = ScratchTask("toy", "toy", 100, 40, 1, (1e-2,), lambda made=made: made, network)
        drawn = []
        for seed in (0, 1):
            for split in ("validation", "test"):
                train, judged = ({tuple(x.tolist()) for x in part["features"]} for part in task.splits(seed, split))
                assert (len(train), len(judged)) == (100, 40)
                assert not train & judged
            drawn.append(train)
        assert drawn[0] != drawn[1]


def test_statistics() -> None:
    """Intervals are scipy's; Spearman's correlation is the mean of scipy's over the pairs."""
    generator = np.random.default_rng(0)
    differences = generator.standard_normal(7)
    mean, half = report.interval(differences)
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))

    learned = generator.standard_normal((5, 8)) + np.arange(8) * 0.5
    pairs = [stats.spearmanr(learned[a], learned[b]).statistic for a, b in itertools.combinations(range(5), 2)]
    mean, low, high = claims.agreement(learned)
    assert mean == pytest.approx(np.mean(pairs))
    assert -1.0 <= low < mean < high <= 1.0


def test_tables(tmp_path: Path) -> None:
    """Paired by seed: a seed that only one of two recipes has is left out of their difference."""
    results = tmp_path / "study.csv"
    scores = {("gelu", 0): 0.80, ("gelu", 1): 0.90, ("gelu", 2): 0.10, ("refit_late", 0): 0.81, ("refit_late", 1): 0.93}
    made = [
        {"task": "movies", "recipe": recipe, "seed": seed, "split": "test", "accuracy": value, "before": value - 0.005}
        for (recipe, seed), value in scores.items()
    ]
    append(results, study.FIELDS, made)
    append(results, study.FIELDS, [{**made[0], "split": "validation", "accuracy": 0.0}])
    found, before = report.accuracies(results), report.accuracies(results, "before")
    assert report.paired(found, "refit_late", "gelu", ["movies"]) == pytest.approx([1.0, 3.0])
    lines = report.table(found, ["movies"]).splitlines()
    assert lines[2].split("|")[2].strip() == "60.0"
    assert lines[3].split("|")[3].strip().startswith("+2.0 ± 12.7")
    assert "+0.5" in report.gaps(found, before, ["movies"]).splitlines()[-1]


def test_the_tables_of_the_full_size(tmp_path: Path) -> None:
    """What lacks rows is left out; a rate is that of the test rows, whatever else was tried; minutes are a mean."""
    results = tmp_path / "study_full.csv"
    row = {"task": "newsgroups", "recipe": "gelu", "split": "test", "rate": "0.0001", "accuracy": 0.7}
    append(results, study.FIELDS, [{**row, "seed": seed, "seconds": 60 * (seed + 1)} for seed in (0, 1)])
    append(results, study.FIELDS, [{**row, "recipe": "hinges_after", "seed": seed, "accuracy": 0.69} for seed in (0, 1)])
    append(results, study.FIELDS, [{**row, "seed": 100, "split": "validation", "rate": "0.0002", "seconds": 6000}])
    append(results, study.FIELDS, [{**row, "recipe": "relu_first", "seed": 0}])  # one seed of two: not shown
    head, _, *lines = report.headline(report.accuracies(results), FULL).splitlines()
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert len(lines) == 1
    assert cells == ["MiniLM-L6, 20 Newsgroups", "70.0", "69.0 (−1.0 ± 0.0)"]
    assert [cell.strip() for cell in head.split("|")[2:-1]] == ["GELU", report.HEADLINE["hinges_after"]]
    assert protocol.chosen(read(results), FULL, {"gelu": "GELU", "paper": "the paper's"}).splitlines() == [
        "| recipe | newsgroups |",
        "|---|---|",
        "| GELU | 0.0001, 1.5 |",
        "| the paper's | – |",
    ]
    assert protocol.tasks(FULL[-1:], tuned=True).splitlines()[2:] == [
        "| `newsgroups` | MiniLM-L6, 20 Newsgroups | 3,000 × 3 | 48 tokens | 2,000 | 0.0002, 0.0004, 0.0008 |"
    ]


def test_the_table_of_steps_after_the_refit(tmp_path: Path) -> None:
    """Means over the seeds of each setting, over the smooth model's; what is there is not run again."""
    results = tmp_path / "distilled.csv"
    common = {"variant": "k2", "steps": 60, "rate": "0.0002", "smooth": 50.0, "refit": 55.0, "seconds": 10}
    append(results, distilled.FIELDS, [{**common, "seed": seed, "distilled": 51 + seed} for seed in (0, 1)])
    append(results, distilled.FIELDS, [{**common, "seed": 0, "steps": 20, "distilled": 54}])
    first, second = distilled.table(results).splitlines()[2:]
    assert first == "| k2 | 60 | 0.0002 | 2 | 50.00 | 55.00 | 1.100 | 51.50 | 1.030 | 10 |"
    assert second == "| k2 | 20 | 0.0002 | 1 | 50.00 | 55.00 | 1.100 | 54.00 | 1.080 | 10 |"
    options = argparse.Namespace(results=results, steps=60, rate=2e-4)
    assert [distilled._is_there("k2", seed, options) for seed in (0, 1, 2)] == [True, True, False]


class TinyTask:
    """In the place of SmolLM2: a Llama of two layers, which is judged by its loss."""

    metric = "loss"

    def __init__(self) -> None:
        self.folder = str(FOLDERS[0])

    def load(self) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folder)

    def batches(self, seed: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": part} for part in tokens(64, seed).split(8)]

    @torch.no_grad()
    def judge(self, model: LlamaForCausalLM, device: str) -> tuple[float, float]:
        ids = tokens(8, 9)
        return float(model(input_ids=ids, labels=ids).loss), math.nan


FOLDERS: list[Path] = []


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 99, (count, 16), generator=torch.Generator().manual_seed(seed))


def test_steps_after_the_refit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has what a recount of the model in the cache gives; the model is refit once; what was measured is not again."""
    tiny.build("llama").save_pretrained(tmp_path / "smooth")
    monkeypatch.setattr(f"{__name__}.FOLDERS", [tmp_path / "smooth"])
    monkeypatch.setattr(distilled, "SmolLM2", TinyTask)
    monkeypatch.setattr(distilled, "windows", lambda *_: tokens(64, 5))
    monkeypatch.setattr(distilled.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    line = ["--cache", str(tmp_path / "cache"), "--results", str(tmp_path / "rows.csv"), "--variants", "k1", "--steps", "3"]
    distilled.main([*line, "--seeds", "0", "--rate", "1e-3"])
    (row,) = read(tmp_path / "rows.csv")
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "cache" / "smollm2-k1-seed0").eval()
    assert kept.config.hidden_act == "relu"
    task = TinyTask()
    assert float(row["refit"]) == pytest.approx(task.judge(kept, "cpu")[0], abs=1e-4)
    assert float(row["smooth"]) == pytest.approx(task.judge(task.load().eval(), "cpu")[0], abs=1e-4)
    assert len({row["smooth"], row["refit"], row["distilled"]}) == 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-k1-seed0"]
    monkeypatch.setattr(distilled, "measure", None)
    distilled.main([*line, "--seeds", "0", "--rate", "1e-3"])


def test_updates() -> None:
    """Near λ = 1 a naive step of SGD hardly moves λ; at the start of the paper it goes 25 times too far, here and there."""
    first = {}
    for update, start in itertools.product(("naive", "aware"), updates.STARTS):
        trace = list(itertools.islice(updates.trace(TASK, "sgd", update, start, 0), 2))
        first[update, start] = np.abs(np.subtract(*trace)).max()
        assert trace[0] == pytest.approx([start] * 3, rel=1e-5)
    paper, near = updates.STARTS
    for start in (paper, near):
        sigma = 1.0 - np.exp(-(start - 1.0))  # σ(s/t) where softplus(s/t) = λ − 1
        ratio = first["naive", start] / first["aware", start]
        assert ratio == pytest.approx((sigma / 0.1) ** 2, rel=0.05)
