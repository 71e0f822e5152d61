"""A refit of a model that FSDP2 has cut up over two processes, against one process with the whole model and all batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import sharded_work
from support.processes import module_in_fresh_process
from support.states import largest_difference

Outcomes = dict[str, list[Any]]

REFUSED = {
    "bad_batch": ("CalibrationError", "calibration batch 2: FSDPBertForSequenceClassification.forward raised IndexError"),
    "at_the_end": ("OSError", "the last line"),
    "alone": (
        "ValueError",
        "compensate='least_squares' of one process needs whole weights, which FSDP or DeepSpeed has cut",
    ),
    "hinges": ("ValueError", "hinges=… or budget=… needs whole weights, which FSDP or DeepSpeed has cut up here"),
    "root_alone": ("ValueError", "fully_shard was called on the whole of FSDPBertForSequenceClassification alone"),
    "two_dimensions": ("ValueError", "cannot bring bert.embeddings.word_embeddings.weight together, which is placed as"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of each case, what the first process has in the end and what the second."""
    folder = tmp_path_factory.mktemp("sharded")
    said = module_in_fresh_process("support.sharded_work", str(folder))[-3000:]
    found: Outcomes = {}
    for name in sharded_work.CASES:
        files = [folder / f"{name}-{rank}.pt" for rank in (0, 1)]
        assert all(file.exists() for file in files), said
        found[name] = [torch.load(file, weights_only=False) for file in files]
    return found


def check_same(first: Any, second: Any) -> None:
    """To the last bit, and the same report."""
    assert first["error"] is second["error"] is None, first["error"]
    assert first["report"] == second["report"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.parametrize("name", ["bert", "vit", "hardened", "measured", "in_fp32", "experts"])
def test_as_one_process_with_the_whole_model(name: str, outcomes: Outcomes) -> None:
    """All processes have the same function, with FSDP2 back in its place: that of one process but for rounding."""
    first, second = outcomes[name]
    check_same(first, second)
    alone = sharded_work.CASES[name](0, 1)
    tolerance = 2e-6 if name == "in_fp32" else 1e-6 if name == "experts" else 1e-8
    assert largest_difference(alone["weights"], first["weights"]) < tolerance
    if name != "hardened":
        assert torch.equal(first["logits"], second["logits"])
        largest = float(alone["logits"].abs().max())
        assert float((first["logits"] - alone["logits"]).abs().max()) < tolerance * largest
        assert float((first["logits"] - first["logits before"]).abs().max()) > 1e-4 * largest


def test_a_refit_in_a_training_loop(outcomes: Outcomes) -> None:
    """The optimizer that was made before goes on with the refit weights, and with λ at its end."""
    first, second = outcomes["hardened"]
    alone = sharded_work.hardened(0, 1)
    assert first["profile"] == second["profile"] == pytest.approx(alone["profile"])
    assert list(first["profile"].values()) == pytest.approx([159.58] * 2, abs=0.01)
    assert largest_difference(alone["afterwards"], first["afterwards"]) < 1e-8
    assert largest_difference(first["weights"], first["afterwards"]) > 1e-4


def test_as_processes_with_whole_models(outcomes: Outcomes) -> None:
    """To the last bit, biases that maps were given too; these are not trained, as FSDP2 does not know them."""
    first, second = outcomes["llama"]
    check_same(first, second)
    for found, (whole, bert) in zip(outcomes["llama"], outcomes["replicated"], strict=True):
        for wanted, case in ((whole, found), (bert, outcomes["bert"][0])):
            assert wanted["error"] is None
            assert wanted["weights"].keys() == case["weights"].keys()
            assert all(torch.equal(value, case["weights"][name]) for name, value in wanted["weights"].items())
        biases = {name for name, trained in found["trained"].items() if not trained}
        assert biases == {f"model.layers.{i}.mlp.{m}_proj.bias" for i in range(2) for m in ("gate", "up", "down")}
    assert float((first["logits"] - sharded_work.llama(0, 1)["logits"]).abs().max()) < 1e-6


def test_a_block_that_one_process_cannot_run_apart(outcomes: Outcomes) -> None:
    """All of them run the model whole then, which brings its blocks in one after the other."""
    first, second = outcomes["cannot_be_replayed"]
    check_same(first, second)
    assert largest_difference(sharded_work.bert(0, 1)["weights"], first["weights"]) < 1e-6


def test_statistics(outcomes: Outcomes) -> None:
    first, second = outcomes["calibrated"]
    assert first == second
    alone = sharded_work.calibrated(0, 1)["sites"]
    assert [site["count"] for site in first["sites"]] == [site["count"] for site in alone]
    assert [site["std"] for site in first["sites"]] == pytest.approx([site["std"] for site in alone])


def test_processes_run_the_model_as_often_as_they_like(outcomes: Outcomes) -> None:
    """The other one answers, until nobody asks any more; what comes out is the whole model's, to the last bit."""
    nothing, found = outcomes["one_runs"]
    assert nothing == []
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, sharded_work.one_runs(0, 1), strict=True))


def test_a_block_at_a_time(outcomes: Outcomes) -> None:
    """Of weights that have blocks, no process holds more at a time than those of one, brought together again and again."""
    for found in outcomes["bert"]:
        assert 0 < found["most"] <= found["block"]
        assert found["times"] > 20


@pytest.mark.parametrize("name", REFUSED)
def test_all_raise(name: str, outcomes: Outcomes) -> None:
    """The same kind of error, each one's parts of the weights as they were, and FSDP2 goes on with them."""
    kind, message = REFUSED[name]
    for found in outcomes[name]:
        assert found["error"][0] == kind
        assert message in found["error"][1]
        assert found["untouched"]
        if "logits" in found:
            assert torch.equal(found["logits"], found["logits before"])
    if name in ("bad_batch", "at_the_end"):
        assert outcomes[name][0]["error"][1].startswith("process 1: ")


def test_a_stop_on_one(outcomes: Outcomes) -> None:
    """The other one learns it where it asks for weights, within a forward."""
    first, second = outcomes["stopped"]
    assert first["error"] == ("RuntimeError", "process 1: stopped by KeyboardInterrupt. The model is as it was")
    assert second["error"][0] == "KeyboardInterrupt"
    assert first["untouched"]
    assert second["untouched"]
    assert torch.equal(first["logits"], first["logits before"])
