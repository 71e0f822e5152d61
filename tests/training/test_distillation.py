"""A ReLU network learns from its smooth original: against float64, twins and stock; adapters, processes, evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import distilled as d
from support.folders import load
from support.hub_server import HubServer
from support.processes import in_fresh_process
from support.publishing import hub_with_a_cache
from support.training import StopAfterSaving, logged
from transformers import FalconConfig, FalconForCausalLM, LlamaForCausalLM, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.adapter_hardness import _save_pretrained
from hf_lambda_gelu.training.dropout import without_dropout

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
NO_DROPOUT = dict.fromkeys(DROPOUT, 0.0)


def slow_sgd(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[dict[str, Any]]) -> PreTrainedModel:
    """One step of SGD on each batch as a whole, in float64."""
    twin, wise = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    for batch in batches:
        with torch.no_grad():
            wanted = wise(**batch).logits.log_softmax(-1)
        given = twin(**batch).logits.log_softmax(-1)
        apart = (wanted.exp() * (wanted - given)).sum(-1)
        loss = apart[batch["attention_mask"].bool()].mean()
        twin.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
    return twin


@pytest.mark.parametrize("how", [{}, {"gradient_accumulation_steps": 4}, {"gradient_checkpointing": True}])
def test_steps_are_those_of_whole_batches(how: dict[str, Any], tmp_path: Path) -> None:
    """Three steps of SGD, in one piece and accumulated from pieces with unlike padding, against float64."""
    student, teacher = d.pair("llama")
    rows = d.texts(24)
    expected = slow_sgd(student, teacher, [d.stacked(rows[i : i + 8]) for i in (0, 8, 16)])
    start = {name: value.clone() for name, value in student.state_dict().items()}
    size = 8 // how.get("gradient_accumulation_steps", 1)
    made = d.trainer(
        student, teacher, tmp_path, rows, per_device_train_batch_size=size, train_sampling_strategy="sequential", **how
    )
    made.train()
    for name, value in expected.state_dict().items():
        moved, wanted = student.state_dict()[name] - start[name], value - start[name].double()
        assert float((moved - wanted).norm()) <= 1e-3 * float(wanted.norm()) + 1e-9, name
    assert float((student.state_dict()["lm_head.weight"] - start["lm_head.weight"]).norm()) > 1e-3


def test_two_processes(tmp_path: Path) -> None:
    """Each has batches of its own, with unlike padding: the weights are those of one process with whole batches."""
    code = """
    import os, sys
    sys.path[:0] = ["tests", "."]
    import torch
    import torch.multiprocessing as mp
    from support import distilled as d
    import hf_lambda_gelu as hlg

    def work(rank, port):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update(WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
        student, teacher = d.pair("llama")
        arguments = d.arguments(FOLDER, per_device_train_batch_size=2, train_sampling_strategy="sequential")
        made = hlg.DistillationTrainer(
            student, arguments, teacher=teacher, train_dataset=d.texts(12), data_collator=d.stacked
        )
        made.train()
        assert made.args.world_size == 2
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        torch.save([student.state_dict(), losses], FOLDER + f"/{rank}")

    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.set_num_threads(1)
    mp.start_processes(work, (port,), nprocs=2, start_method="fork")
    """
    in_fresh_process(code.replace("FOLDER", repr(str(tmp_path))))
    student, teacher = d.pair("llama")
    one = d.trainer(student, teacher, tmp_path, d.texts(12), train_sampling_strategy="sequential")
    one.train()
    several = [torch.load(tmp_path / name) for name in ("0", "1")]
    for weights, losses in several:
        assert losses == pytest.approx(list(logged(one).values()), rel=1e-4)
        for name, value in student.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, several[1][0][name]) for name, value in several[0][0].items())


@pytest.mark.parametrize("wrap", [lambda model: model, d.adapted], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_run(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """To the bit, with dropout and AdamW; of the teacher no bit changes and none is saved."""
    changes = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 4}
    rows = d.texts(20)

    def build(folder: Path) -> tuple[Any, Any, hlg.DistillationTrainer]:
        student, teacher = d.pair("bert", hidden_dropout_prob=0.1)
        student = wrap(student)
        made = d.trainer(student, teacher, folder, rows, **changes)
        return student, teacher.train(), made

    expected, teacher, twin = build(tmp_path / "twin")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    twin.train()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())

    _, _, stopped = build(tmp_path / "run")
    stopped.add_callback(StopAfterSaving(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    saved = load_file(next((tmp_path / "run" / "checkpoint-4").glob("*.safetensors")))
    trained = {name for name, value in expected.named_parameters() if value.requires_grad}
    assert len(saved) <= len(expected.state_dict())
    assert (len(saved) == len(trained)) or wrap is not d.adapted  # of adapters alone

    resumed, _, again = build(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    wanted = expected.state_dict()
    assert not [name for name, value in resumed.state_dict().items() if not torch.equal(value, wanted[name])]
    assert logged(again) == logged(twin)


def test_adapters_are_merged_and_stock_loads_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only adapters move; merged into the weights they compute the same, and stock transformers loads the folder.

    Saved by themselves, they name the base that `relu_ize` has made another of since: that is said.
    """
    student, teacher = d.pair("llama")
    base = {name: value.clone() for name, value in student.state_dict().items()}
    model = d.adapted(student)
    d.trainer(model, teacher, tmp_path / "run", d.texts(12), optim="adamw_torch", learning_rate=1e-2).train()
    moved = {name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in model.state_dict().items()}
    assert all(torch.equal(moved[name], value) for name, value in base.items())
    batch = d.stacked(d.texts(4))
    model.eval()
    _save_pretrained.__globals__["logger"].warning_once.cache_clear()
    model.save_pretrained(tmp_path / "adapters")
    assert "do not hold what has become of their base" in caplog.text
    with torch.no_grad():
        outputs = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, outputs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged.model.layers[0].mlp.gate_proj.weight, base["model.layers.0.mlp.gate_proj.weight"])
    hlg.save_relu_pretrained(merged, tmp_path / "relu")
    stock = load(LlamaForCausalLM, tmp_path / "relu")
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, merged(**batch).logits)


def test_it_learns_and_is_evaluated_without_labels(tmp_path: Path) -> None:
    """`eval_loss` is the loss of examples without labels, and falls; with labels, metrics get the student's logits."""
    student, teacher = d.pair("bert-classifier", **NO_DROPOUT)
    rows = d.texts(16)
    made = d.trainer(student, teacher, tmp_path, rows, max_steps=40, optim="adamw_torch", learning_rate=3e-4)
    before = made.evaluate(rows)["eval_loss"]
    outputs = [d.run_in_double(model, d.stacked(rows)).detach().numpy() for model in (student, teacher)]
    assert before == pytest.approx(np.mean([d.kl(t, s) for s, t in zip(*outputs, strict=True)]), rel=1e-3)
    made.train()
    assert made.evaluate(rows)["eval_loss"] < before / 2
    seen: list[Any] = []
    made.compute_metrics = lambda found: seen.append(found) or {"accuracy": 1.0}  # type: ignore[func-returns-value]
    metrics = made.evaluate([{**row, "labels": torch.tensor(1)} for row in rows])
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_loss"] < before / 2
    with torch.no_grad():
        logits = student.eval()(**d.stacked(rows)).logits
    np.testing.assert_allclose(seen[0].predictions, logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["bert-classifier", "vit"])
def test_nothing_is_dropped(name: str, tmp_path: Path) -> None:
    """A student with dropout in its modules and its attention learns what one without does; both stay as they were."""
    learned = []
    for probabilities in (DROPOUT, NO_DROPOUT):
        student, teacher = d.pair(name, **probabilities)
        before = [vars(module).get("p") for module in student.modules()]
        rows = d.texts(12) if name != "vit" else [{"pixel_values": torch.full((3, 32, 32), 0.1 * i)} for i in range(12)]
        d.trainer(student, teacher, tmp_path, rows, train_sampling_strategy="sequential").train()
        assert [vars(module).get("p") for module in student.modules()] == before
        assert student.config.hidden_dropout_prob == probabilities["hidden_dropout_prob"]
        learned.append(student.state_dict())
    assert all(torch.equal(value, learned[1][key]) for key, value in learned[0].items())


def test_nothing_is_dropped_by_the_config() -> None:
    """Falcon's layers read their probabilities from the config when they run: in train mode they compute as in eval mode."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FalconConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.5)
    student, inputs = FalconForCausalLM(config), torch.arange(1, 13)[None]
    with torch.no_grad():
        wanted = student.eval()(inputs).logits
        with without_dropout(student):
            assert torch.equal(student.train()(inputs).logits, wanted)
        assert not torch.equal(student.train()(inputs).logits, wanted)


def test_nothing_is_augmented(tmp_path: Path) -> None:
    """SpecAugment masks what a student hears in train mode alone, which the teacher hears: a student learns as without."""
    learned = []
    for augmented in (False, True):
        masks = {"mask_time_prob": 0.5, "mask_time_length": 2, "apply_spec_augment": augmented}
        student, teacher = d.pair("wav2vec2", **masks)
        rows = [{"input_values": torch.randn(400, generator=torch.Generator().manual_seed(i))} for i in range(12)]
        d.trainer(student, teacher, tmp_path, rows, train_sampling_strategy="sequential").train()
        assert "train" not in vars(student.wav2vec2)
        assert student.wav2vec2.training == student.training
        learned.append(student.state_dict())
    assert all(torch.equal(value, learned[1][key]) for key, value in learned[0].items())


def test_modes_are_those_that_were_asked_for() -> None:
    """Whatever is put into train or eval mode within is in it afterwards, and the rest as it was: as of a twin."""
    student, twin = (d.pair("bert-classifier")[0] for _ in range(2))
    for model, block in ((student, without_dropout(student)), (twin, nullcontext())):
        model.train()
        model.bert.embeddings.eval()
        with block:
            model.bert.encoder.layer[0].eval()
    assert [module.training for module in student.modules()] == [module.training for module in twin.modules()]


def test_mixed_precision(tmp_path: Path) -> None:
    """Under bf16 both run in it, and the loss is fp32's to its precision; the weights stay fp32."""
    losses = {}
    for name, how in (("fp32", {}), ("bf16", {"bf16": True})):
        student, teacher = d.pair("llama")
        made = d.trainer(student, teacher, tmp_path, d.texts(12), **how)
        made.train()
        losses[name] = logged(made)
        assert student.dtype == torch.float32
    assert list(losses["bf16"].values()) == pytest.approx(list(losses["fp32"].values()), rel=0.1)
    assert losses["bf16"] != losses["fp32"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub from which teachers are downloaded into a cache of their own."""
    yield from hub_with_a_cache(monkeypatch, tmp_path / "cache")


def test_a_folder_and_a_hub_name(tmp_path: Path, hub: HubServer) -> None:
    """The teacher of a folder computes what the model in memory does; so does one on the Hub."""
    student, teacher = d.pair("bert-classifier")
    teacher.save_pretrained(tmp_path / "smooth")
    hub.add_repo("someone/smooth", {path.name: path.read_bytes() for path in (tmp_path / "smooth").iterdir()})
    batch = d.stacked(d.texts(4))
    with torch.no_grad():
        expected = d.trainer(student, teacher, tmp_path).compute_loss(student, dict(batch))
        for name in (tmp_path / "smooth", "someone/smooth"):
            named = d.trainer(student, name, tmp_path)
            assert torch.equal(named.compute_loss(student, dict(batch)), expected)
            assert not named.teacher.training
    assert any("/someone/smooth/resolve/" in request.path for request in hub.requests)
