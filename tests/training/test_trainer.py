"""LambdaGELUTrainer against plain loops, closed formulas and stock models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.training import HOLD, SITES, STEPS, TARGET, Rows, arguments, converted, logged, stock_twin, trained, trainer_of
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Adafactor, PreTrainedModel, Trainer, TrainingArguments

import hf_lambda_gelu as hlg

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
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in weights + hardness))
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
    """The twin has no Trainer: λ is its own parameter, clipped to ≥ 1; float64 leaves no room for rounding."""
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
    without = [p for name, p in model.named_parameters() if "unclipped_hardness" not in name]
    for parameters, expected in ((model.parameters(), "weight decay 0.01"), (without, "none of the optimizer's groups")):
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        args = arguments(tmp_path)
        trainer = hlg.LambdaGELUTrainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None))
        with pytest.raises(ValueError, match=expected):
            trainer.train()
        assert trainer.state.global_step == 0


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
