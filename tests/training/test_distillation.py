"""A ReLU network learns from its smooth original: the loss against loops in float64, twins, adapters, stock, refusals."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import distilled as d
from support import tiny
from support.folders import load
from support.processes import in_fresh_process
from support.training import StopAfterSaving, logged
from transformers import BertModel, LlamaForCausalLM, PreTrainedModel, TrainingArguments

import hf_lambda_gelu as hlg

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
NO_DROPOUT = dict.fromkeys(DROPOUT, 0.0)


def trainer(
    student: Any, teacher: Any, folder: Path, rows: list[Any] | None = None, **changes: Any
) -> hlg.DistillationTrainer:
    return hlg.DistillationTrainer(
        student, d.arguments(folder, **changes), teacher=teacher, train_dataset=rows, data_collator=d.stacked
    )


# --------------------------------------------------------------------------------------------------------------- the loss


def by_tokens(distance: Callable[..., float], counts: Callable[[dict[str, Any], int, int], bool]) -> Callable[..., float]:
    """The mean over the tokens of a batch that count."""

    def mean(student: np.ndarray, teacher: np.ndarray, batch: dict[str, Any]) -> float:
        places = [(i, j) for i in range(student.shape[0]) for j in range(student.shape[1]) if counts(batch, i, j)]
        assert places
        return sum(distance(teacher[i, j], student[i, j]) for i, j in places) / len(places)

    return mean


def by_examples(distance: Callable[..., float]) -> Callable[..., float]:
    def mean(student: np.ndarray, teacher: np.ndarray, batch: dict[str, Any]) -> float:
        counted = [i for i in range(len(student)) if batch.get("labels") is None or batch["labels"].dim() > 1]
        counted = counted or [i for i, label in enumerate(batch["labels"].tolist()) if label != -100]
        return sum(distance(teacher[i].reshape(-1), student[i].reshape(-1)) for i in counted) / len(counted)

    return mean


def real(batch: dict[str, Any], i: int, j: int) -> bool:
    return bool(batch["attention_mask"][i, j])


def labelled(batch: dict[str, Any], i: int, j: int) -> bool:
    return real(batch, i, j) and bool(batch["labels"][i, j] != -100)


def next_labelled(batch: dict[str, Any], i: int, j: int) -> bool:
    return j < 10 and real(batch, i, j) and bool(batch["labels"][i, j + 1] != -100)


def images(_: bool) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def text(labels: bool) -> dict[str, Any]:
    return d.stacked(d.texts(6, labels))


def classes(kind: str) -> Callable[[bool], dict[str, Any]]:
    made = {"left out": torch.tensor([1, -100, 0, 1, -100, 0]), "several": torch.eye(3).repeat(2, 1)}
    return lambda _: {**text(False), "labels": made[kind]}


def decoded(_: bool) -> dict[str, Any]:
    ids = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(1))
    return {**d.stacked(d.texts(3)), "labels": torch.where(ids < 30, -100, ids)}


CASES: dict[str, tuple[str, Any, dict[str, Any], Callable[[bool], dict[str, Any]], bool, Callable[..., float]]] = {
    "causal": ("llama", None, {}, text, False, by_tokens(d.kl, real)),
    "causal, labels": ("gpt2", None, {}, text, True, by_tokens(d.kl, next_labelled)),
    "masked, labels": ("bert", None, {}, text, True, by_tokens(d.kl, labelled)),
    "classes": ("bert-classifier", None, {}, text, False, by_examples(d.kl)),
    "classes, left out": ("bert-classifier", None, {}, classes("left out"), False, by_examples(d.kl)),
    "several labels": ("bert-classifier", None, {"num_labels": 3}, classes("several"), False, by_examples(d.bernoulli_kl)),
    "regression": (
        *("bert-classifier", None, {"num_labels": 1}, text, False),
        by_examples(lambda t, s: float(((t - s) ** 2).sum())),
    ),
    "image classes": ("vit", None, {}, images, False, by_examples(d.kl)),
    "states of text": ("bert", BertModel, {}, text, False, by_tokens(d.relative, real)),
    "decoder": ("t5", None, {"decoder_start_token_id": 0, "pad_token_id": 0}, decoded, True, by_tokens(
        d.kl, lambda batch, i, j: bool(batch["labels"][i, j] != -100))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss(case: str, tmp_path: Path) -> None:
    """Its value in fp32 is that of loops in float64, which padding and labels of −100 do not enter."""
    name, cls, overrides, batches, labels, reference = CASES[case]
    student, teacher = d.pair(name, cls, **overrides)
    batch = batches(labels)
    before = teacher.config.to_dict()
    made = trainer(student, teacher, tmp_path)
    with torch.no_grad():
        loss = float(made.compute_loss(student, dict(batch)))
        expected = reference(*(d.run_in_double(model, batch).numpy() for model in (student, teacher)), batch)
    assert loss == pytest.approx(expected, rel=2e-4)
    assert expected > 1e-5  # nothing is compared with itself
    assert teacher.config.to_dict() == before


def test_states_of_images_and_half_precision(tmp_path: Path) -> None:
    """Relative error by image; a teacher in bf16 takes the student's fp32 pixels."""
    student, teacher = (model.base_model for model in d.pair("dinov2"))
    batch = images(False)
    with torch.no_grad():
        loss = float(trainer(student, teacher, tmp_path).compute_loss(student, dict(batch)))
        ours, wanted = (d.run_in_double(model, batch).numpy() for model in (student, teacher))
        half = float(trainer(student, copy.deepcopy(teacher).bfloat16(), tmp_path).compute_loss(student, dict(batch)))
    assert loss == pytest.approx(np.mean([d.relative(t, s) for s, t in zip(ours, wanted, strict=True)]), rel=2e-4)
    assert half == pytest.approx(loss, rel=0.1)
    assert half != loss


# ---------------------------------------------------------------------------------------------------------------- training


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
    made = trainer(
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
    one = trainer(student, teacher, tmp_path, d.texts(12), train_sampling_strategy="sequential")
    one.train()
    several = [torch.load(tmp_path / name) for name in ("0", "1")]
    for weights, losses in several:
        assert losses == pytest.approx(list(logged(one).values()), rel=1e-4)
        for name, value in student.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, several[1][0][name]) for name, value in several[0][0].items())


def adapted(student: PreTrainedModel) -> Any:
    torch.manual_seed(3)
    return get_peft_model(student, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_run(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """To the bit, with dropout and AdamW; of the teacher no bit changes and none is saved."""
    changes = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 4}
    rows = d.texts(20)

    def build(folder: Path) -> tuple[Any, Any, hlg.DistillationTrainer]:
        student, teacher = d.pair("bert", hidden_dropout_prob=0.1)
        student = wrap(student)
        made = trainer(student, teacher, folder, rows, **changes)
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
    assert (len(saved) == len(trained)) or wrap is not adapted  # of adapters alone

    resumed, _, again = build(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    wanted = expected.state_dict()
    assert not [name for name, value in resumed.state_dict().items() if not torch.equal(value, wanted[name])]
    assert logged(again) == logged(twin)


def test_adapters_are_merged_and_stock_loads_them(tmp_path: Path) -> None:
    """Only adapters move; merged into the weights they compute the same, and stock transformers loads the folder."""
    student, teacher = d.pair("llama")
    base = {name: value.clone() for name, value in student.state_dict().items()}
    model = adapted(student)
    trainer(model, teacher, tmp_path / "run", d.texts(12), optim="adamw_torch", learning_rate=1e-2).train()
    moved = {name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in model.state_dict().items()}
    assert all(torch.equal(moved[name], value) for name, value in base.items())
    batch = d.stacked(d.texts(4))
    model.eval()
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
    made = trainer(student, teacher, tmp_path, rows, max_steps=40, optim="adamw_torch", learning_rate=3e-4)
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
        trainer(student, teacher, tmp_path, rows, train_sampling_strategy="sequential").train()
        assert [vars(module).get("p") for module in student.modules()] == before
        assert student.config.hidden_dropout_prob == probabilities["hidden_dropout_prob"]
        learned.append(student.state_dict())
    assert all(torch.equal(value, learned[1][key]) for key, value in learned[0].items())


def test_mixed_precision(tmp_path: Path) -> None:
    """Under bf16 both run in it, and the loss is fp32's to its precision; the weights stay fp32."""
    losses = {}
    for name, how in (("fp32", {}), ("bf16", {"bf16": True})):
        student, teacher = d.pair("llama")
        made = trainer(student, teacher, tmp_path, d.texts(12), **how)
        made.train()
        losses[name] = logged(made)
        assert student.dtype == torch.float32
    assert list(losses["bf16"].values()) == pytest.approx(list(losses["fp32"].values()), rel=0.1)
    assert losses["bf16"] != losses["fp32"]


# ---------------------------------------------------------------------------------------------------------------- refusals


def renamed(teacher: PreTrainedModel, labels: list[str]) -> PreTrainedModel:
    teacher.config.id2label = dict(enumerate(labels))
    return teacher


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: (s, s), "the teacher is the student itself"),
        (lambda s, t: (adapted(s), s), "the teacher is the student itself, or shares weights"),
        (lambda s, t: (s, None), "expected a model of transformers as teacher"),
        (lambda s, t: (s, torch.nn.Linear(2, 2)), "its folder or Hub name, got Linear"),
        (lambda s, t: (s, "no/such-teacher"), "neither a folder nor a model on the Hub"),
        (lambda s, t: (s, tiny.build("bert")), "its task is 'fill-mask', the student's is 'text-classification'"),
        (lambda s, t: (s, tiny.build("bert-classifier", vocab_size=98)), "its vocabulary size is 98, the student's is 99"),
        (lambda s, t: (s, tiny.build("bert-classifier", num_labels=3)), "its number of labels is 3, the student's is 2"),
        (lambda s, t: (renamed(s, ["no", "yes"]), renamed(t, ["yes", "no"])), "its list of labels is {0: 'yes', 1: 'no'}"),
        (lambda s, t: (hlg.convert(t) and t, s), "still has 2 λ-GELU modules"),
        (lambda s, t: ("name", t), "expected the student, a model, got str"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_fit(make: Callable[..., Any], message: str, tmp_path: Path) -> None:
    """Refused when the trainer is made, before a batch is looked at."""
    student, teacher = make(*d.pair("bert-classifier"))
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(student, teacher, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_loss_func": len}, "compute_loss_func is not taken"),
        ({"model_init": len}, "model_init is not taken"),
        ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1"),
    ],
)
def test_another_loss(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    student, teacher = d.pair("bert-classifier")
    args = TrainingArguments(str(tmp_path), use_cpu=True, **changes.pop("args", {}))
    with pytest.raises(ValueError, match=message):
        hlg.DistillationTrainer(student, args, teacher=teacher, **changes)


def test_outputs_that_do_not_fit(tmp_path: Path) -> None:
    """What no config says is said at the first batch, before a weight changes."""
    student, teacher = d.pair("llama")
    teacher.lm_head = torch.nn.Linear(32, 98)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=r"logits of the student has the shape \(4, 11, 99\), of the teacher \(4, 11, 98\)"):
        trainer(student, teacher, tmp_path, d.texts(4)).train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    speech = tiny.build("wav2vec2")
    student = copy.deepcopy(speech)
    hlg.convert(student)
    hlg.relu_ize(student, force=True)
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.tensor([[1] * 400, [1] * 200 + [0] * 200])}
    with pytest.raises(ValueError, match="the batch has padding"):
        trainer(student, speech, tmp_path).compute_loss(student, batch)


def test_divergence_is_said(tmp_path: Path) -> None:
    """A rate far too high: an error with the step, and no checkpoint of weights that are no numbers."""
    student, teacher = d.pair("llama")
    made = trainer(student, teacher, tmp_path, d.texts(12), learning_rate=1e18, save_strategy="steps", save_steps=3)
    with pytest.raises(FloatingPointError, match="training has diverged"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not math.isfinite(sum(float(p.detach().sum()) for p in student.parameters()))


def test_a_folder_and_a_hub_name(tmp_path: Path, hub: Any) -> None:
    """The teacher of a folder computes what the model in memory does; so does one on the Hub."""
    student, teacher = d.pair("bert-classifier")
    teacher.save_pretrained(tmp_path / "smooth")
    batch = d.stacked(d.texts(4))
    with torch.no_grad():
        expected = trainer(student, teacher, tmp_path).compute_loss(student, dict(batch))
        named = trainer(student, tmp_path / "smooth", tmp_path)
        assert torch.equal(named.compute_loss(student, dict(batch)), expected)
    assert not named.teacher.training
