"""Two processes that refit together, against one that has all batches; what one of them raises, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import team_work
from support.processes import module_in_fresh_process
from support.states import largest_difference

Outcomes = dict[str, list[Any]]

# of the weights, by the largest of each, in fp64; in fp32 a solve makes more of sums that are rounded in another order
SAME, SAME_FP32 = 1e-7, 1e-5
REFUSED = {
    "early": ("ValueError", "2 processes were started, and have not been brought together"),
    "broken_loader": ("OSError", "the disk is gone"),
    "bad_batch": ("CalibrationError", "calibration batch 2: BertForSequenceClassification.forward raised IndexError"),
    "soft": ("SoftGateError", "2 of 2 gates are soft"),
    "same_batches": ("CalibrationError", "process 0 has no calibration batch that process 1 has not"),
    "other_weights": ("DivergedError", "classifier.weight of process 1 is not that of process 0"),
    "other_options": ("DivergedError", "what is asked for is not the same on every process: {'compensate': 'least_squares'"),
    "not_said": ("ValueError", "2 processes run, and it is not said whether they work together: processes='all', called"),
    "unknown": ("ValueError", "unknown processes='two'"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of each case, what the first process has in the end and what the second."""
    folder = tmp_path_factory.mktemp("team")
    said = module_in_fresh_process("support.team_work", str(folder))[-3000:]
    found: Outcomes = {}
    for name in ("early", "command", *team_work.CASES):
        files = [folder / f"{name}-{rank}.pt" for rank in range(team_work.SIZE)]
        found[name] = [torch.load(file, weights_only=False) if file.exists() else said for file in files]
    return found


def check_same(first: Any, second: Any) -> None:
    """To the last bit, and the same report."""
    assert first["error"] is second["error"] is None, first["error"]
    assert first["report"] == second["report"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def check_like_one(found: Any, alone: Any, tolerance: float = SAME) -> None:
    assert alone["error"] is None
    assert largest_difference(found["weights"], alone["weights"]) < tolerance
    assert check_numbers(found["report"], alone["report"]) > 5


def check_numbers(found: Any, alone: Any, where: str = "") -> int:
    """The same words and whole numbers, and nearly the same others; how many there were."""
    if isinstance(alone, dict):
        assert list(found) == list(alone), where
        return sum(check_numbers(found[key], value, f"{where}.{key}") for key, value in alone.items())
    if isinstance(alone, (list, tuple)):
        assert len(found) == len(alone), where
        return sum(check_numbers(a, b, where) for a, b in zip(found, alone, strict=True))
    assert found == (pytest.approx(alone, rel=1e-5, abs=1e-9) if isinstance(alone, float) else alone), where
    return int(isinstance(alone, (int, float)))


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "empty_share", "experts", "minimax", "measured", "hardened"])
def test_as_one_process_with_all_batches(name: str, outcomes: Outcomes) -> None:
    """The processes have the same bits; weights and report are those of one process but for rounding."""
    first, second = outcomes[name]
    check_same(first, second)
    check_like_one(first, team_work.CASES[name](0, 1), SAME_FP32 if name == "experts" else SAME)


def test_layers_are_wider(outcomes: Outcomes) -> None:
    """What is compared above is refit, layers with more hinges too, and metrics are measured on all batches."""
    for name, units in (("llama", 46), ("empty_share", 74)):
        report = outcomes[name][0]["report"]
        assert {tuple(site["units"]) for site in report["hinges"]["sites"]} == {(37, units)}
        assert "least_squares" in {site["method"] for site in report["compensation"]["sites"]}
        assert report["compensation"]["sites"][0]["rows"] == 20 * 11
    assert set(outcomes["bert"][0]["report"]["metrics"]) == {"loss", "accuracy"}


def test_a_block_that_one_process_cannot_run_apart(outcomes: Outcomes) -> None:
    """All of them run the model whole then, and end with the same bits."""
    first, second = outcomes["cannot_be_replayed"]
    check_same(first, second)
    check_like_one(first, team_work.bert(0, 1), 1e-6)


def test_statistics(outcomes: Outcomes) -> None:
    (report, histograms), (second, others) = outcomes["calibrated"]
    alone, expected = team_work.calibrated(0, 1)
    assert report == second
    assert check_numbers(report, alone) == 20
    for one, other, wanted in zip(histograms, others, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_all_raise(name: str, outcomes: Outcomes) -> None:
    """The same kind of error on both, the model as it was on both; the cases after it go on with the same group."""
    kind, message = REFUSED[name]
    for rank, found in enumerate(outcomes[name]):
        assert found["error"][0] == kind
        assert message in found["error"][1]
        assert found["untouched"], rank
    if name in ("broken_loader", "bad_batch"):
        assert outcomes[name][0]["error"][1].startswith("process 1: ")


def test_a_stop_on_one(outcomes: Outcomes) -> None:
    first, second = outcomes["stopped"]
    assert first["error"][0] == "KeyboardInterrupt"
    assert second["error"] == ("RuntimeError", "process 0: stopped by KeyboardInterrupt. The model is as it was")
    assert first["untouched"]
    assert second["untouched"]


def test_a_process_that_is_killed(outcomes: Outcomes) -> None:
    first, _ = outcomes["killed"]
    assert first["error"][0] == "RuntimeError"
    assert "another of the 2 processes that work together has ended, or cannot be reached" in first["error"][1]
    assert first["untouched"]


def test_the_first_process_alone(outcomes: Outcomes) -> None:
    """It waits for nobody, and refits on what it is given."""
    first, second = outcomes["first_alone"]
    assert second is None
    check_like_one(first, team_work.bert(0, 1))


def test_command(outcomes: Outcomes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the processes prints and saves; what cannot be shared is refused on both."""
    monkeypatch.setenv("TEAM_WORK_FOLDER", str(tmp_path))
    team_work.checkpoint(tmp_path)
    (text, weights, refused), (nothing, _, others) = outcomes["command"]
    alone, expected, _ = team_work.command(0, 1)
    assert largest_difference(weights, expected) < SAME_FP32
    assert nothing == ""
    assert [line for line in text.splitlines() if "stream" in line] == [x for x in alone.splitlines() if "stream" in x]
    assert "2 activations are ReLU now" in text
    for messages in zip(refused, others, strict=True):
        for message in messages:
            assert "2 processes were started, and each would do all of it" in message


def test_loaders_of_accelerate(outcomes: Outcomes) -> None:
    """Its shares, where no example is repeated; where some are, that is refused."""
    (even, first), (_, second) = outcomes["with_accelerate"]
    assert even["error"][0] == "CalibrationError"
    assert "repeats 1 of its examples" in even["error"][1]
    assert "even_batches=False" in even["error"][1]
    assert even["untouched"]
    check_same(first, second)
    check_like_one(first, team_work.with_accelerate(0, 1)[1])
