"""LambdaGELUTrainer against plain loops, closed formulas, stock models and uninterrupted twins."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from scipy.special import ndtr
from support import tiny
from support.training import (
    HOLD,
    SITES,
    STEPS,
    SWITCH,
    TARGET,
    At,
    Masking,
    NoisyRows,
    Rows,
    StopAfterSaving,
    arguments,
    converted,
    logged,
    trainer_of,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, default_collate
from transformers import (
    Adafactor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import RemoveColumnsCollator

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.switch import calibrated_targets

SWITCH_LATE = 12  # of the runs that are compared with a plain loop
TWIN_SEED = 3  # from λ = 1, the λ of this model bounce off the bound and rise
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Recorder:
    """A collator that keeps what the Trainer was fed, for a twin to be fed the same."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append(default_collate(rows))
        return dict(self.batches[-1])


def trained(model: PreTrainedModel, folder: Path, **changes: Any) -> hlg.LambdaGELUTrainer:
    trainer = trainer_of(model, folder, **changes)
    trainer.train()
    return trainer


def stock_twin(model: PreTrainedModel, activation: str, weights: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A model that transformers builds with a stock activation, with the weights of `model` and no λ."""
    config = copy.deepcopy(model.config)
    config.hidden_act = activation
    twin = type(model)(config)
    state = model.state_dict() if weights is None else weights
    twin.load_state_dict({name: value for name, value in state.items() if "raw_hardness" not in name}, strict=True)
    return twin.eval()


@torch.no_grad()
def loss_and_accuracy(model: PreTrainedModel, rows: Rows) -> tuple[float, float]:
    logits = model(input_ids=rows.tokens).logits
    return float(F.cross_entropy(logits, rows.labels)), float((logits.argmax(-1) == rows.labels).float().mean())


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# --- parameter groups


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_parameter_groups(tmp_path: Path, optim: str) -> None:
    """Against the groups that the stock Trainer makes of the unconverted model, plus one group for λ."""
    changes = {"optim": optim, "weight_decay": 0.1, "learning_rate": 2e-4}
    stock = tiny.build("bert-classifier")
    stock.classifier.bias.requires_grad_(False)
    stock_optimizer = Trainer(stock, arguments(tmp_path, TrainingArguments, **changes)).create_optimizer()

    model = converted()
    model.classifier.bias.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, hardness_learning_rate=0.03, **changes)
    groups = trainer.create_optimizer().param_groups

    counts = Counter(id(p) for group in groups for p in group["params"])
    assert counts == Counter(id(p) for p in model.parameters() if p.requires_grad)
    assert all(model.get_submodule(site).raw_hardness.requires_grad for site in SITES)

    def named(of: nn.Module, group: dict[str, Any]) -> set[str]:
        names = {id(p): name for name, p in of.named_parameters()}
        return {names[id(p)] for p in group["params"]}

    assert [named(model, g) for g in groups[:-1]] == [named(stock, g) for g in stock_optimizer.param_groups]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2e-4, 0.1), (2e-4, 0.0), (0.03, 0.0)]
    assert named(model, groups[-1]) == {f"{site}.raw_hardness" for site in SITES}
    assert type(trainer.optimizer) is type(stock_optimizer)


# --- learning λ, against a loop without Trainer and without the parameterization


class TwinGate(nn.Module):
    """x Φ(λx) with λ itself as the parameter."""

    def __init__(self, hardness: float) -> None:
        super().__init__()
        self.hardness = nn.Parameter(torch.tensor([hardness], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.special.ndtr(self.hardness * x)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8),
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adafactor": lambda groups: Adafactor(groups, scale_parameter=False, relative_step=False),
}


def plain_loop(
    start: float, optim: str, batches: list[dict[str, Tensor]], rates: tuple[float, float], max_norm: float
) -> tuple[PreTrainedModel, list[list[float]], list[float]]:
    """Model, λ after each step, and loss of each step; weight decay 0.1, linear schedule with 3 steps of warmup."""
    model = tiny.build("bert-classifier", TWIN_SEED, **NO_DROPOUT).double()
    gates = [TwinGate(start) for _ in SITES]
    for site, gate in zip(SITES, gates, strict=True):
        model.get_submodule(site.rpartition(".")[0]).intermediate_act_fn = gate
    weights = [p for name, p in model.named_parameters() if not name.endswith("hardness")]
    hardness = [gate.hardness for gate in gates]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1], "lr": rates[0], "weight_decay": 0.1},
        {"params": [p for p in weights if p.dim() == 1], "lr": rates[0], "weight_decay": 0.0},
        {"params": hardness, "lr": rates[1], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[optim](groups)
    profile, losses = [], []
    model.train()
    for step, batch in enumerate(batches[:STEPS]):
        for group, rate in zip(optimizer.param_groups, (rates[0], *rates), strict=True):
            group["lr"] = rate * (step / 3 if step < 3 else (STEPS - step) / (STEPS - 3))
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        if max_norm:
            # the Trainer clips by the norm of the gradients that it sees, which for s is ∂L/∂λ · (1 − e^(1 − λ)) / t
            seen = [p.grad for p in weights] + [h.grad * (1 - torch.exp(1 - h.detach())) / 0.1 for h in hardness]
            norm = math.sqrt(sum(float(g.square().sum()) for g in seen))
            for p in weights + hardness:
                p.grad *= min(1.0, max_norm / (norm + 1e-6))
        optimizer.step()
        for h in hardness:
            h.data.clamp_(min=1.0)
            if step + 1 >= SWITCH_LATE:
                if step + 1 == SWITCH_LATE:
                    h.at_switch = h.item()
                progress = min(1.0, (step + 1 - SWITCH_LATE) / (HOLD - SWITCH_LATE))
                h.data.fill_(math.exp((1 - progress) * math.log(h.at_switch) + progress * math.log(TARGET)))
        profile.append([h.item() for h in hardness])
        losses.append(loss.item())
    return model, profile, losses


@pytest.mark.parametrize(
    ("optim", "start", "hardness_rate", "max_norm"),
    [
        ("adamw_torch", 1.0, 0.02, 0.0),
        ("adamw_torch", 1.7, 0.05, 0.5),
        ("sgd", 1.7, 3.0, 0.0),
        ("rmsprop", 1.7, 0.02, 0.0),
        ("adagrad", 1.2, 0.05, 0.0),
        ("adafactor", 1.7, 0.05, 0.5),
    ],
)
def test_the_trainer_is_a_plain_loop_that_steps_in_hardness(
    tmp_path: Path, optim: str, start: float, hardness_rate: float, max_norm: float
) -> None:
    """The twin has neither Trainer nor s: λ is its own parameter, clipped to ≥ 1; float64 leaves no room for rounding."""
    recorder = Recorder()
    options = {"optim": optim, "max_grad_norm": max_norm, "weight_decay": 0.1, "learning_rate": 2e-3, "warmup_steps": 3}
    trainer = hlg.LambdaGELUTrainer(
        converted(TWIN_SEED, start, **NO_DROPOUT).double(),
        arguments(tmp_path, hardness_learning_rate=hardness_rate, hardness_switch_point=SWITCH_LATE / STEPS, **options),
        train_dataset=Rows(),
        data_collator=recorder,
    )
    trainer.train()
    twin, profile, losses = plain_loop(start, optim, recorder.batches, (2e-3, hardness_rate), max_norm)

    learned = torch.tensor(profile[:SWITCH_LATE])
    assert (learned - start).abs().amax(0).min() > 5e-3  # every λ has moved
    assert (learned == 1.0).any() == (start == 1.0)
    got = torch.tensor([list(logged(trainer, f"hardness/{site}").values()) for site in SITES]).T
    torch.testing.assert_close(got, torch.tensor(profile), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(list(logged(trainer).values()), losses, rtol=1e-6, atol=0.0)
    weights = stock_twin(trainer.model, "gelu").state_dict()
    for name, value in twin.state_dict().items():
        # the gradient of a key's bias is 0 but for rounding, which Adafactor's normalisation blows up
        if not name.endswith(("hardness", "key.bias")):
            torch.testing.assert_close(weights[name].double(), value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_second_training_of_a_model_init_steps_in_hardness_too(tmp_path: Path) -> None:
    """Adam's first step is its learning rate whatever the gradient, so λ must move by exactly that, in every `train()`."""
    trainer = hlg.LambdaGELUTrainer(
        args=arguments(tmp_path, max_steps=2, hardness_switch_point=1.0, hardness_hold=0.0, hardness_learning_rate=0.05),
        train_dataset=Rows(),
        model_init=lambda: converted(hardness=1.7),
    )
    for _ in range(2):  # as a hyperparameter search does
        trainer.train()
        for site in SITES:
            assert abs(logged(trainer, f"hardness/{site}")[1] - 1.7) == pytest.approx(0.05, rel=1e-3)


# --- the ramp

SHAPES: dict[str, Callable[[float, float], float]] = {
    "geometric": lambda t, start: math.exp(math.log(start) + t * (math.log(TARGET) - math.log(start))),
    "linear": lambda t, start: start * (1 - t) + TARGET * t,
    "cosine": lambda t, start: start + (TARGET - start) * math.sin(math.pi * t / 2) ** 2,
    "reciprocal": lambda t, start: start * TARGET / (TARGET + t * (start - TARGET)),
}


@pytest.mark.parametrize(
    ("shape", "switch_point", "hold", "switch", "last"),
    [
        ("geometric", 0.25, 0.1, 5, 18),
        ("linear", 0.25, 0.1, 5, 18),
        ("cosine", 0.3, 0.0, 6, 20),
        ("reciprocal", 0.21, 0.22, 5, 15),
        ("linear", 0.1, 0.8, 2, 4),  # 1 − 0.8 is less than 0.2 in binary
        ("geometric", 0.0, 0.0, 0, 20),
        ("linear", 1.0, 0.0, 20, 20),
        ("cosine", 0.5, 0.5, 10, 10),
    ],
)
def test_ramp_in_the_log(tmp_path: Path, shape: str, switch_point: float, hold: float, switch: int, last: int) -> None:
    """λ of every logged step against closed formulas of the step, from the λ that was learned."""
    model = converted(hardness=1.5)
    trainer = trained(
        model,
        tmp_path,
        hardness_switch_point=switch_point,
        hardness_hold=hold,
        hardness_ramp=shape,
        hardness_learning_rate=0.05,
    )
    for site in SITES:
        log = {0: 1.5, **logged(trainer, f"hardness/{site}")}
        assert list(log) == list(range(STEPS + 1))
        steps_learning = [log[k] - log[k - 1] for k in range(1, min(switch, last - 1) + 1)]
        assert all(0.0 < abs(delta) < 0.2 for delta in steps_learning)
        # a ramp of no length jumps at its one step, so that the learned λ is nowhere in the log
        start = log[switch] if switch < last else trainer.learned_hardness[site]
        assert start == pytest.approx(1.5, abs=0.05 * switch + 1e-6)
        for step in range(switch, STEPS + 1):
            progress = 1.0 if step >= last else (step - switch) / (last - switch)
            assert log[step] == pytest.approx(SHAPES[shape](progress, start), rel=2e-6), step
        assert trainer.learned_hardness[site] == pytest.approx(start, rel=1e-6)
        assert model.get_submodule(site).hardness.item() == pytest.approx(159.5769, abs=1e-3)
    assert {key for entry in trainer.state.log_history for key in entry if "hardness" in key} == {
        f"hardness/{site}" for site in SITES
    }


# --- evaluation with the gates as ReLU


def test_eval_relu_metrics_are_those_of_a_relu_network(tmp_path: Path) -> None:
    """Against stock BERTs with the same weights, one with gelu and one with relu in its config, evaluated in one batch."""
    model = converted()
    sets = {"first": Rows(16, 1), "second": Rows(24, 2)}
    before = tiny.outputs(model, tiny.inputs(model))
    trainer = hlg.LambdaGELUTrainer(model, arguments(tmp_path), eval_dataset=sets, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        for activation, prefix in (("gelu", ""), ("relu", "relu_")):
            loss, share = loss_and_accuracy(stock_twin(model, activation), rows)
            assert metrics[f"eval_{name}_{prefix}loss"] == pytest.approx(loss, rel=1e-5)
            assert metrics[f"eval_{name}_{prefix}accuracy"] == pytest.approx(share)
        assert abs(metrics[f"eval_{name}_loss"] - metrics[f"eval_{name}_relu_loss"]) > 1e-2  # the comparison can fail
    prediction = trainer.predict(sets["first"])
    assert prediction.metrics["test_relu_loss"] == pytest.approx(metrics["eval_first_relu_loss"])
    smooth = stock_twin(model, "gelu")(sets["first"].tokens).logits.detach()  # predictions are those of the smooth model
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), smooth, rtol=1e-5, atol=1e-6)
    assert tiny.relative_difference(before, tiny.outputs(model, tiny.inputs(model))) == 0.0

    trainer.args.eval_relu = False
    assert not [key for key in trainer.evaluate() if "relu" in key]


def test_gates_are_smooth_again_after_a_failing_evaluation(tmp_path: Path) -> None:
    """The outputs are compared, not the flags."""
    model = converted()
    before = tiny.outputs(model, tiny.inputs(model))
    calls = []

    def failing(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(prediction)
        if len(calls) == 2:  # the second pass is the one with ReLU
            raise RuntimeError("metric failed")
        return {}

    trainer = hlg.LambdaGELUTrainer(model, arguments(tmp_path), eval_dataset=Rows(16, 1), compute_metrics=failing)
    with pytest.raises(RuntimeError, match="metric failed"):
        trainer.evaluate()
    assert tiny.relative_difference(before, tiny.outputs(model, tiny.inputs(model))) == 0.0


def test_best_checkpoint_by_the_relu_loss(tmp_path: Path) -> None:
    """The best checkpoint is found again from the files, by stock ReLU models with their weights."""
    rows = Rows(64, 1)
    args = arguments(
        tmp_path,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        hardness_switch_point=1.0,  # soft gates to the end, so that the smooth and the ReLU loss differ
        hardness_hold=0.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_relu_loss",
    )
    trainer = hlg.LambdaGELUTrainer(converted(seed=4), args, train_dataset=Rows(128), eval_dataset=rows)
    trainer.train()
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in range(2, STEPS + 1, 2)}
    relu = {step: loss_and_accuracy(stock_twin(trainer.model, "relu", weights), rows)[0] for step, weights in saved.items()}
    assert logged(trainer, "eval_relu_loss") == pytest.approx(relu, rel=1e-5)
    best = min(relu, key=relu.__getitem__)
    smooth = logged(trainer, "eval_loss")
    assert min(smooth, key=smooth.__getitem__) != best  # another choice than by the smooth loss
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(value, saved[best][name]) for name, value in trainer.model.state_dict().items())
    both = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert all("eval_relu_loss" in entry for entry in both)  # one log line, hence one event for the callbacks


@pytest.mark.parametrize(
    ("metric", "warned"), [(None, True), ("eval_accuracy", True), ("eval_relu_accuracy", False), ("relu_loss", False)]
)
def test_warning_about_a_smooth_metric_for_the_best_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metric: str | None, warned: bool
) -> None:
    """A smooth metric is warned of before training, and the warning names the metric to take."""
    strategy = {"eval_strategy": "steps", "save_strategy": "steps", "metric_for_best_model": metric}
    trainer_of(converted(), tmp_path, load_best_model_at_end=True, **strategy)
    warnings = [record.getMessage() for record in caplog.records if "load_best_model_at_end" in record.getMessage()]
    assert len(warnings) == warned
    if warned:
        assert f"'eval_relu_{'accuracy' if metric else 'loss'}'" in warnings[0]


# --- resume

RESUME = {"hardness_learning_rate": 0.05, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "seed": 7}


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        # before the switch, also at an epoch's end; at it; in the ramp, also at an epoch's end; last of it; in the hold
        ({}, (2, 4, SWITCH, 9, 16, HOLD - 1, HOLD + 1)),
        (
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            (2, 4, SWITCH, 9, 16, HOLD - 1, HOLD + 1),
        ),
        ({"hardness_target": "calibrated"}, (4, 9)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, changes: dict[str, Any], stops: tuple[int, ...]) -> None:
    """Bit for bit, with shuffling and dropout: killed after a checkpoint, continued by a new trainer and a new model."""
    rows = Rows(28)  # 4 optimizer steps per epoch, the last one of a smaller batch

    def build(model: PreTrainedModel, folder: Path, **more: Any) -> hlg.LambdaGELUTrainer:
        return hlg.LambdaGELUTrainer(model, arguments(folder, **RESUME, **changes, **more), train_dataset=rows)

    twin = build(converted(hardness=1.3), tmp_path / "twin")
    twin.train()
    expected = twin.model.state_dict()
    assert len({*logged(twin, f"hardness/{SITES[0]}").values()}) == HOLD  # another λ after every step, until it is held

    for step in stops:
        folder = tmp_path / f"{step}"
        saving = {"save_strategy": "steps", "save_steps": step, "restore_callback_states_from_checkpoint": bool(step % 2)}
        interrupted = build(converted(hardness=1.3), folder, **saving)
        interrupted.add_callback(StopAfterSaving(step))
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()

        resumed = build(converted(seed=99), folder, **saving)  # other weights: everything must come from the checkpoint
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert not [name for name, value in resumed.model.state_dict().items() if not torch.equal(value, expected[name])], (
            step
        )
        for key in ("loss", "grad_norm", *(f"hardness/{site}" for site in SITES)):
            assert logged(resumed, key) == logged(twin, key), (step, key)
        assert resumed.learned_hardness == twin.learned_hardness, step
        assert resumed.hardness_targets == twin.hardness_targets, step
        assert set(resumed.hardness_targets) == set(SITES)


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    """Nothing is left to do, and nothing changes: λ is at the target, the learned λ is the one from the switch."""
    first = trained(converted(hardness=1.3), tmp_path, save_strategy="steps", save_steps=STEPS, **RESUME)
    again = trainer_of(converted(seed=99), tmp_path, **RESUME)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(v, first.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    assert again.learned_hardness == first.learned_hardness


def error_as_relu(x: np.ndarray, hardness: float) -> float:
    """Of x Φ(λx), relative to ReLU, root mean square."""
    relu = np.maximum(x, 0)
    return math.sqrt(((x * ndtr(hardness * x) - relu) ** 2).mean() / (relu**2).mean())


def test_calibrated_targets(tmp_path: Path) -> None:
    """From 64 of 100 rows, on the network at the switch: root finding on the definition, with what hooks see in a copy."""
    rows = Rows(100)
    copies: list[PreTrainedModel] = []
    args = arguments(tmp_path, hardness_target="calibrated", hardness_relative_tolerance=0.02, hardness_learning_rate=0.05)
    trainer = hlg.LambdaGELUTrainer(converted(hardness=1.5), args, train_dataset=rows)
    trainer.add_callback(At(lambda model: copies.append(copy.deepcopy(model)), SWITCH))
    assert trainer.hardness_targets == {}
    trainer.train()
    chosen = torch.tensor([k * 100 // 64 for k in range(64)])
    seen: dict[str, np.ndarray] = {}
    for site in SITES:
        copies[0].get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: seen.update({site: args[0].double().numpy().ravel()})
        )
    with torch.no_grad():
        copies[0].eval()(rows.tokens[chosen])
    targets = trainer.hardness_targets
    for site in SITES:
        expected = brentq(lambda h, x=seen[site]: error_as_relu(x, h) - 0.02, 1.0, 1e4)
        assert targets[site] == pytest.approx(expected, rel=2e-3)
        log, start = logged(trainer, f"hardness/{site}"), trainer.learned_hardness[site]
        assert start == log[SWITCH] < 2.0
        for step in range(SWITCH, STEPS + 1):
            progress = min(1.0, (step - SWITCH) / (HOLD - SWITCH))
            assert log[step] == pytest.approx(start ** (1 - progress) * targets[site] ** progress, rel=2e-6), step
    assert abs(targets[SITES[0]] / targets[SITES[1]] - 1) > 0.01


def test_calibrating_disturbs_neither_data_nor_random_numbers(tmp_path: Path) -> None:
    """Shuffling, dropout, a data set and a collator that draw: what the model is fed and the states after every step."""
    records = []
    for target in ("l1", "calibrated"):
        fed: list[Tensor] = []
        states: list[Any] = []
        model = converted(hardness=1.5)
        model.register_forward_pre_hook(
            lambda m, args, kwargs, fed=fed: fed.append(kwargs["input_ids"]) if m.training else None, with_kwargs=True
        )
        args = arguments(tmp_path, hardness_target=target)
        trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=NoisyRows(), data_collator=Masking())
        trainer.add_callback(
            At(lambda _, s=states: s.append((random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())))
        )
        trainer.train()
        records.append((torch.stack(fed), states, trainer))
    assert torch.equal(records[0][0], records[1][0])
    assert records[0][1] == records[1][1]
    first, second = (record[2] for record in records)
    assert first.hardness_targets == dict.fromkeys(SITES, pytest.approx(TARGET))
    assert logged(first)[SWITCH + 1] == logged(second)[SWITCH + 1]
    assert logged(first)[SWITCH + 2] != logged(second)[SWITCH + 2]


def test_calibrated_targets_do_not_depend_on_the_random_state() -> None:
    """So all processes measure the same, wherever their random numbers stand."""
    model, collator = converted(), Masking()
    found = []
    for seed in (1, 2):
        for generator in (torch, np.random, random):
            (getattr(generator, "manual_seed", None) or generator.seed)(seed)
        model.train(seed == 2)
        args = hlg.LambdaGELUTrainingArguments(use_cpu=True)
        wrapped = RemoveColumnsCollator(collator, ["input_ids", "labels"])
        found.append(calibrated_targets(model, args, NoisyRows(), wrapped))
    assert found[0] == found[1]
    assert torch.equal(collator.generator.get_state(), Masking().generator.get_state())


def test_calibrated_targets_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `broadcast_object_list` brings is used, whatever was measured here."""
    monkeypatch.setattr(
        "hf_lambda_gelu.training.switch.broadcast_object_list", lambda objects: [dict.fromkeys(objects[0], 7.0)]
    )
    args = hlg.LambdaGELUTrainingArguments(use_cpu=True)
    assert calibrated_targets(converted(), args, Rows(), default_collate) == dict.fromkeys(SITES, 7.0)


def test_a_calibrated_target_below_the_learned_hardness(tmp_path: Path) -> None:
    """λ stays what was learned: a ramp never goes down."""
    trainer = trained(
        converted(hardness=1.5), tmp_path, hardness_target="calibrated", hardness_relative_tolerance=10.0, max_steps=8
    )
    assert trainer.hardness_targets == dict.fromkeys(SITES, 1.0)
    assert hlg.hardness_profile(trainer.model) == pytest.approx(trainer.learned_hardness, rel=1e-6)
    assert min(trainer.learned_hardness.values()) > 1.3


def test_calibrated_targets_of_a_ramp_from_the_start(tmp_path: Path) -> None:
    """Columns that the model does not take are left out of a `datasets` set too; a second `train()` measures again."""
    rows = Rows()
    words = [[0] * index for index in range(32)]
    data = datasets.Dataset.from_dict({"input_ids": rows.tokens.tolist(), "labels": rows.labels.tolist(), "words": words})
    args = arguments(tmp_path, hardness_target="calibrated", hardness_switch_point=0.0, max_steps=2, learning_rate=0.5)
    trainer = hlg.LambdaGELUTrainer(converted(), args, train_dataset=data)
    expected = hlg.calibrate(trainer.model, [{"input_ids": rows.tokens}]).targets()
    trainer.train()
    first = trainer.hardness_targets
    assert first == pytest.approx(expected, rel=2e-3)
    trainer.train()
    assert max(abs(trainer.hardness_targets[site] / first[site] - 1) for site in SITES) > 0.05


def test_calibrated_targets_and_checkpoints(tmp_path: Path) -> None:
    """A checkpoint in the ramp holds the targets; that of an ℓ1 run does not, and they are measured on resuming."""
    saving = {"save_strategy": "steps", "save_steps": 9}
    for name in ("calibrated", "l1"):
        trainer = trainer_of(converted(hardness=1.5), tmp_path / name, hardness_target=name, **saving)
        trainer.add_callback(StopAfterSaving(9))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        text = (tmp_path / name / "checkpoint-9" / "trainer_state.json").read_text()
        kept = json.loads(text)["stateful_callbacks"]["HardeningCallback"]["attributes"]
        assert kept == {
            "at_switch": trainer.learned_hardness,
            "calibrated": None if name == "l1" else trainer.hardness_targets,
        }

    resumed = trainer_of(converted(seed=9), tmp_path / "l1", hardness_target="calibrated", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.learned_hardness == trainer.learned_hardness
    assert all(2.0 < resumed.hardness_targets[site] < 100.0 for site in SITES)
    assert hlg.hardness_profile(resumed.model) == pytest.approx(resumed.hardness_targets, rel=1e-5)


def test_training_sets_that_cannot_be_indexed(tmp_path: Path) -> None:
    """Refused before the first step, and only if they are needed."""

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            rows = Rows(64)
            return (rows[index] for index in range(64))

    for target in ("l1", "calibrated"):
        args = arguments(tmp_path, hardness_target=target, max_steps=2)
        trainer = hlg.LambdaGELUTrainer(converted(), args, train_dataset=Stream())
        if target == "l1":
            trainer.train()
        else:
            with pytest.raises(ValueError, match=r"take examples by their index, .* is a Stream without length or index"):
                trainer.train()
            assert trainer.state.global_step == 0


# --- bad input


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hardness_switch_point": -0.1}, r"switch point .*\[0, 1\], got -0\.1"),
        ({"hardness_switch_point": 1.1}, r"switch point .*\[0, 1\], got 1\.1"),
        ({"hardness_switch_point": math.nan}, r"switch point .*\[0, 1\], got nan"),
        ({"hardness_hold": -0.5}, r"hold fraction .*\[0, 1\], got -0\.5"),
        ({"hardness_switch_point": 0.7, "hardness_hold": 0.4}, r"0\.7 .* 0\.4 = 1\.1 .*must not exceed 1"),
        ({"hardness_tolerance": math.nan}, r"tolerance must be a finite number > 0.*, got nan"),
        ({"hardness_tolerance": -1.0}, r"tolerance must be a finite number > 0.*, got -1\.0"),
        ({"hardness_tolerance": 0.0}, r"tolerance must be a finite number > 0.*, got 0\.0"),
        ({"hardness_relative_tolerance": 0.0}, r"relative tolerance must be a finite number > 0.*, got 0\.0"),
        ({"hardness_relative_tolerance": math.inf}, r"relative tolerance must be a finite number > 0.*, got inf"),
        ({"hardness_target": "measured"}, r"unknown hardness_target 'measured': expected 'l1' or 'calibrated'"),
        ({"hardness_ramp": "exponential"}, r"'exponential': expected one of geometric, linear, cosine, reciprocal"),
        ({"hardness_learning_rate": math.nan}, r"hardness_learning_rate must be a .*number >= 0, got nan"),
        ({"hardness_learning_rate": math.inf}, r"hardness_learning_rate must be a .*number >= 0, got inf"),
        ({"hardness_learning_rate": -0.01}, r"hardness_learning_rate must be a .*number >= 0, got -0\.01"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    """Refused by the arguments alone, with the value that was got and the range that is expected."""
    with pytest.raises(ValueError, match=expected):
        arguments(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_what_the_trainer_refuses_to_start_with(tmp_path: Path) -> None:
    """An unconverted model, arguments of the stock class, a folder below a file, an optimizer that would decay λ."""
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no λ-GELU: call hf_lambda_gelu\.convert"):
        trainer_of(tiny.build("bert-classifier"), tmp_path)
    with pytest.raises(ValueError, match="expects LambdaGELUTrainingArguments, got TrainingArguments"):
        hlg.LambdaGELUTrainer(converted(), arguments(tmp_path, TrainingArguments))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into .*file/out'.*Choose another folder"):
        trainer_of(converted(), tmp_path / "file" / "out")

    model = converted()
    without = [p for name, p in model.named_parameters() if "raw_hardness" not in name]
    for parameters, expected in ((model.parameters(), "weight decay 0.01"), (without, "none of the optimizer's groups")):
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        args = arguments(tmp_path)
        trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None))
        with pytest.raises(ValueError, match=expected):
            trainer.train()
        assert trainer.state.global_step == 0


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """Refused before a single weight is read, with the names; the model stays as it was, bit for bit."""

    def shorter(convert: bool) -> PreTrainedModel:
        model = tiny.build("bert-classifier")
        model.config.num_hidden_layers = 1
        model.bert.encoder.layer = model.bert.encoder.layer[:1]
        if convert:
            hlg.convert(model)
        return model

    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(shorter(True), tmp_path / "other", **saving)
    stock = arguments(tmp_path / "stock", TrainingArguments, **saving)
    Trainer(tiny.build("bert-classifier"), stock, train_dataset=Rows()).train()
    trained(converted(), tmp_path / "more", **saving)

    cases = [
        (converted(seed=1), "other", rf"holds λ for 1 sites, the model has 2.*only in the model: .*{SITES[1]}"),
        (converted(seed=1), "stock", rf"holds λ for 0 sites, the model has 2.*only in the model: .*{SITES[0]}"),
        (shorter(True), "more", rf"holds λ for 2 sites, the model has 1.*only in the checkpoint: .*{SITES[1]}"),
    ]
    for model, name, expected in cases:
        before = copy.deepcopy(model.state_dict())
        trainer = trainer_of(model, tmp_path / "new", **saving)
        with pytest.raises(ValueError, match=expected):
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    # λ of other sites in the state of the run, though the weights fit
    state = tmp_path / "more" / "checkpoint-2" / "trainer_state.json"
    record = json.loads(state.read_text())
    record["stateful_callbacks"]["HardeningCallback"]["attributes"]["at_switch"] = {"elsewhere": 2.0}
    state.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"was hardening \['elsewhere'\], the model has λ-GELU at"):
        trainer_of(converted(), tmp_path / "new").train(resume_from_checkpoint=str(state.parent))


# --- command line


def test_command_line_of_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Every field that the class adds to TrainingArguments is on the command line, with a help text, and parses."""
    added = {f.name: f for f in fields(hlg.LambdaGELUTrainingArguments)}
    for field in fields(TrainingArguments):
        added.pop(field.name)
    parser = HfArgumentParser(hlg.LambdaGELUTrainingArguments)
    actions = {action.dest: action for action in parser._actions}
    assert {name for name in added if name.startswith("hardness_")} == {
        f"hardness_{name}"
        for name in (
            *("learning_rate", "switch_point", "compensate", "ramp", "hold"),
            *("target", "tolerance", "relative_tolerance"),
        )
    }
    shown = parser.format_help()
    for name in added:
        assert f"--{name}" in shown
        assert len(actions[name].help) > 30, name
    assert list(actions["hardness_ramp"].choices) == ["geometric", "linear", "cosine", "reciprocal"]

    line = "--output_dir out --hardness_learning_rate 0.5 --hardness_switch_point 0.4 --hardness_ramp cosine"
    line += " --hardness_tolerance 0.01 --hardness_hold 0.2 --eval_relu false"
    line += " --hardness_target calibrated --hardness_relative_tolerance 0.03 --hardness_compensate bias"
    (parsed,) = parser.parse_args_into_dataclasses(line.split())
    got = [getattr(parsed, f"hardness_{n}") for n in ("learning_rate", "switch_point", "ramp", "tolerance", "hold")]
    assert got == [0.5, 0.4, "cosine", 0.01, 0.2]
    assert (parsed.hardness_target, parsed.hardness_relative_tolerance) == ("calibrated", 0.03)
    assert parsed.hardness_compensate == "bias"
    assert parsed.eval_relu is False
    (default,) = parser.parse_args_into_dataclasses(["--output_dir", "out"])
    assert (default.hardness_switch_point, default.hardness_tolerance, default.eval_relu) == (0.75, 0.005, True)
    assert (default.hardness_compensate, default.hardness_target) == ("least_squares", "l1")
    assert (default.hardness_target, default.hardness_relative_tolerance) == ("l1", 0.01)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--hardness_ramp", "exponential"])
    assert "'geometric', 'linear', 'cosine', 'reciprocal'" in capsys.readouterr().err.replace("invalid choice", "")


# --- others


def test_an_unconverted_model_of_the_same_process_is_unaffected(tmp_path: Path) -> None:
    """A stock Trainer run before and after a λ-GELU run in the same process: same weights and losses, bit for bit."""

    def stock() -> tuple[dict[int, float], dict[str, Tensor]]:
        trainer = Trainer(tiny.build("bert-classifier"), arguments(tmp_path, TrainingArguments), train_dataset=Rows())
        trainer.train()
        return logged(trainer), trainer.model.state_dict()

    bystander = tiny.build("bert-classifier", seed=5)
    before, (losses, weights) = tiny.outputs(bystander, tiny.inputs(bystander)), stock()
    trained(converted(), tmp_path)
    again, state = stock()
    assert again == losses
    assert all(torch.equal(value, weights[name]) for name, value in state.items())
    assert tiny.relative_difference(before, tiny.outputs(bystander, tiny.inputs(bystander))) == 0.0
    assert not hlg.hardness_sites(bystander)


def test_lora_with_the_activation_as_a_module_to_save(tmp_path: Path) -> None:
    """λ learns beside adapters, ends at the target, and is in the merged model; the base weights are those of before."""
    peft = pytest.importorskip("peft")
    base = converted(hardness=1.5)
    frozen = copy.deepcopy(base.state_dict())
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["query", "value"],
        modules_to_save=["intermediate_act_fn"],
        init_lora_weights=False,
    )
    trainer = trained(peft.get_peft_model(base, config), tmp_path, hardness_learning_rate=0.05, max_steps=8)
    assert any(abs(value - 1.5) > 0.01 for value in trainer.learned_hardness.values())
    merged = trainer.model.merge_and_unload()
    assert list(hlg.hardness_profile(merged).values()) == pytest.approx([TARGET] * 2, rel=1e-5)
    changed = {
        n.split(".")[-2] for n, value in merged.state_dict().items() if n in frozen and not torch.equal(value, frozen[n])
    }
    assert changed == {"query", "value", "intermediate_act_fn", "classifier"}
