"""Layers that become wider at the switch: against `relu_ize` on a copy, plain torch, uninterrupted twins, stock loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SWITCH, At, Rows, StopAfterSaving, arguments, converted, logged
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu import HingeReport

RUN: dict[str, Any] = {
    "max_steps": 10,
    "hardness_compensate": "least_squares",
    "hardness_switch_point": 0.5,
    "hardness_hinges": 2,
    "max_grad_norm": 0.0,
}


def llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    hlg.convert(model)
    return model


def modernbert(seed: int = 0) -> PreTrainedModel:
    """Gate and up are one map."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModernBertConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=3, sep_token_id=4)
    model = ModernBertForSequenceClassification(config)
    hlg.convert(model)
    return model


def trainer(model: PreTrainedModel, folder: Path, optimizer: Any = None, **changes: Any) -> hlg.LambdaGELUTrainer:
    args = arguments(folder, **(RUN | changes))
    optimizers = (None, None) if optimizer is None else (optimizer(model), None)
    return hlg.LambdaGELUTrainer(model, args, train_dataset=Rows(), eval_dataset=Rows(16, 1), optimizers=optimizers)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Without clipping it hides no factor in a gradient."""
    return torch.optim.SGD(hlg.parameter_groups(model, 0.05), lr=0.01, momentum=0.9)


class Copies(TrainerCallback):
    """The model after step `SWITCH`, before and after the callbacks that harden; and the optimizer's state after them."""

    before: PreTrainedModel

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == SWITCH - 1:
            self.before = copy.deepcopy(model)


def batches(rows: Rows, size: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": rows.tokens[i : i + size], "labels": rows.labels[i : i + size]} for i in range(0, len(rows), size)]


@pytest.mark.parametrize("width", [{"hardness_hinges": 2}, {"hardness_hinges": 1, "hardness_budget": 1.5}])
def test_the_model_after_the_switch_is_what_relu_ize_makes(tmp_path: Path, width: dict[str, Any]) -> None:
    """And at the end it is an ordinary wider ReLU network, with a card that says so."""
    run = trainer(converted(hardness=1.2, intermediate_size=64), tmp_path / "run", **width)
    before, after = Copies(), []
    run.add_callback(before)
    run.add_callback(At(lambda model: after.append({n: t.clone() for n, t in model.state_dict().items()}), SWITCH))
    run.train()
    asked = {name.removeprefix("hardness_"): value for name, value in width.items()}
    report = hlg.relu_ize(before.before, calibration=batches(Rows()), compensate="least_squares", **asked)
    units = 128 if "hardness_budget" not in width else 96
    assert run.model.config.intermediate_size == before.before.config.intermediate_size == units
    for name, tensor in before.before.state_dict().items():
        assert torch.allclose(tensor, after[0][name], atol=1e-6), name
    assert run.hinges == report.hinges
    assert json.loads(json.dumps(run.state.stateful_callbacks))["HardeningCallback"]["attributes"]["hinges"]["widths"]

    made = hlg.relu_ize(run.model, calibration=batches(Rows(16, 1)))
    made.hinges, made.compensation = run.hinges, run.compensation
    folder = hlg.save_relu_pretrained(run.model, tmp_path / "relu", report=made)
    loaded = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(loaded(Rows().tokens).logits, run.model.eval()(Rows().tokens).logits)


class Inputs(hlg.LambdaGELUTrainer):
    """Keeps what each training step gets."""

    seen: list[tuple[int, dict[str, Tensor]]]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append((self.state.global_step, {name: value.clone() for name, value in inputs.items()}))
        return super().training_step(model, inputs, *args, **kwargs)


def test_the_optimizer_goes_on(tmp_path: Path) -> None:
    """Two steps after the switch, by plain torch: parameters of another shape begin anew, the others keep their momentum."""
    model = converted(hardness=1.2, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = arguments(tmp_path, **(RUN | {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}))
    run = Inputs(model, args, train_dataset=Rows(64), optimizers=(sgd(model), None))
    run.model_accepts_loss_kwargs = (
        False  # or Trainer leaves out the division by the accumulation, as BERT ignores the kwargs
    )
    run.seen, kept = [], []

    def keep(now: PreTrainedModel) -> None:
        state = {id(p): s["momentum_buffer"].clone() for p, s in run.optimizer.state.items()}
        momentum = {name: state.get(id(p)) for name, p in now.named_parameters()}
        kept.append((copy.deepcopy(now), momentum, {name: p.clone() for name, p in now.named_parameters()}))

    run.add_callback(At(keep, SWITCH))
    after: list[dict[str, Tensor]] = []
    run.add_callback(At(lambda now: after.append({n: p.detach().clone() for n, p in now.named_parameters()}), SWITCH + 2))
    run.train()
    twin, momentum, _ = kept[0]
    wider = {name for name, buffer in momentum.items() if buffer is None}
    layers = [f"bert.encoder.layer.{i}" for i in (0, 1)]
    expected = [f"{layer}.intermediate.dense.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert wider == {*expected, *(f"{layer}.output.dense.weight" for layer in layers)}
    parameters = [(name, p) for name, p in twin.named_parameters() if "unclipped" not in name]
    for step in (SWITCH, SWITCH + 1):
        for inputs in [inputs for at, inputs in run.seen if at == step]:
            (twin(**inputs).loss / 2).backward()
        for name, p in parameters:
            assert p.grad is not None
            buffer = momentum[name]
            momentum[name] = p.grad.clone() if buffer is None else 0.9 * buffer + p.grad
            p.data -= 0.01 * momentum[name]
            p.grad = None
    for name, p in parameters:
        assert torch.allclose(p, after[0][name], atol=1e-6), name
        assert name not in wider or not torch.equal(p, kept[0][2][name]), name


@pytest.mark.parametrize(("make", "steps"), [(converted, (3, SWITCH, 7)), (llama, (7,)), (modernbert, (7,))])
def test_resuming(tmp_path: Path, make: Any, steps: tuple[int, ...]) -> None:
    """From before, at and after the switch, by a new model as wide as at the start; two models' maps get biases there."""
    whole = trainer(make(), tmp_path / "whole")
    whole.train()
    for step in steps:
        options = {"save_strategy": "steps", "save_steps": step}
        cut = trainer(make(), tmp_path / f"{step}", **options)
        cut.add_callback(StopAfterSaving(step))
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        resumed = trainer(make(7), tmp_path / f"{step}", **options)
        resumed.train(resume_from_checkpoint=True)
        assert logged(resumed) == logged(whole)
        assert resumed.hinges == whole.hinges
        ours, theirs = resumed.model.config.to_dict(), whole.model.config.to_dict()
        assert {key for key in ours if ours[key] != theirs[key]} <= {"dtype", "architectures"}  # which a save sets
        for (name, first), second in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(first, second), (step, name)
        assert all(m.out_features == len(m.weight) for m in resumed.model.modules() if isinstance(m, nn.Linear))
    with pytest.raises(
        ValueError, match=r"config.intermediate_size is (74|48) there, and (37|24) here. Set hardness_hinges"
    ):
        trainer(make(), tmp_path / "7", hardness_hinges=1).train(str(tmp_path / "7" / "checkpoint-7"))
    with pytest.raises(ValueError, match=r"with (74|48) units in the place of (37|24).* makes (37|24) into (111|72)"):
        trainer(make(), tmp_path / "7", hardness_hinges=3).train(str(tmp_path / "7" / "checkpoint-7"))


@pytest.mark.parametrize(("best", "units"), [(2, 37), (8, 74)])
def test_the_best_model_is_as_wide_as_its_checkpoint(tmp_path: Path, best: int, units: int) -> None:
    run = trainer(
        converted(),
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_relu_chosen",
    )
    evaluate = run.evaluate

    def chosen(*args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(*args, **kwargs) | {"eval_relu_chosen": -abs(run.state.global_step - best)}

    run.evaluate = chosen  # type: ignore[method-assign]
    run.train()
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.model.config.intermediate_size == units
    loaded = AutoModelForSequenceClassification.from_pretrained(run.state.best_model_checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(loaded(Rows().tokens).logits, run.model.eval()(Rows().tokens).logits)


def test_the_callback_does_what_the_trainer_does(tmp_path: Path) -> None:
    """In a stock Trainer; resumed after the switch with the model of the checkpoint."""
    whole = trainer(converted(), tmp_path / "whole", sgd)
    whole.train()

    def stock(model: PreTrainedModel, callback: TrainerCallback, **changes: Any) -> Trainer:
        args = arguments(tmp_path / "stock", TrainingArguments, max_steps=10, max_grad_norm=0.0, save_steps=7, **changes)
        optimizers = (sgd(model), None)
        return Trainer(model, args, train_dataset=Rows(), optimizers=optimizers, callbacks=[callback])

    def callback() -> hlg.HardnessCallback:
        return hlg.HardnessCallback(hardness_switch_point=0.5, hardness_hinges=2)

    first = callback()
    run = stock(converted(), first, save_strategy="steps")
    run.add_callback(StopAfterSaving(7))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock" / "checkpoint-7")
    second = callback()
    resumed = stock(model, second)
    resumed.train(resume_from_checkpoint=True)
    assert whole.hinges == first.hinges == second.hinges
    for (name, one), other in zip(whole.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(hlg.HingeError, match=r"gate_proj.weight has no bias, .* load the model with mlp_bias=True"):
        stock(llama(), callback()).train()


def test_a_second_run(tmp_path: Path) -> None:
    """Of a model that is made anew for each run, as a search for hyperparameters does; layers are not made wider twice."""
    args = arguments(tmp_path, **(RUN | {"max_steps": 4}))
    run = hlg.LambdaGELUTrainer(model_init=lambda: llama(), args=args, train_dataset=Rows())
    for _ in range(2):
        run.train()
        assert (run.model.config.intermediate_size, run.model.config.mlp_bias) == (48, True)
        assert run.hinges.widths == {"intermediate_size": (24, 48)}
    run = hlg.LambdaGELUTrainer(run.model, args, train_dataset=Rows())
    run._hardening.hinges = HingeReport.of({"sites": [], "widths": {"intermediate_size": (24, 48)}, "single": {}})
    with pytest.raises(ValueError, match="an earlier run of this trainer has made the layers wider already"):
        run.train()
    assert run.model.config.intermediate_size == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardness_compensate": "none"}, "hardness_hinges=2 wants the refit .* set hardness_compensate='least_squares'"),
        ({"hardness_target": "calibrated"}, "hardness_hinges=2 moves the gates' bends .* set hardness_target='l1'"),
        ({"hardness_hinges": 5}, "hardness_hinges and hardness_budget: hinges must be from 1 to 4"),
        ({"hardness_budget": 1.5}, "hinges=2 and budget=1.5 are alternatives"),
    ],
)
def test_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **(RUN | changes))


def test_refused_before_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot follow parameters of another shape, and what cannot be wider; the model is as it was."""
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(message: str, optimizer: Any = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            trainer(model, tmp_path, optimizer, **changes).train()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    refused("Adagrad makes its state, .* when it is built. Take adamw_torch", optim="adagrad")
    refused("torch_compile=True keeps programs for the parameters", torch_compile=True)
    monkeypatch.setattr(hlg.LambdaGELUTrainingArguments, "world_size", 2)
    refused("DistributedDataParallel, over 2 processes, keeps buckets")
    monkeypatch.undo()
    schedulefree = pytest.importorskip("schedulefree")
    refused(
        "AdamWScheduleFree counts its steps for all parameters together",
        lambda model: schedulefree.AdamWScheduleFree(hlg.parameter_groups(model), lr=1e-3),
    )
    wide = converted(intermediate_size=300)
    with pytest.raises(hlg.CalibrationError, match="will have 600 units, and the calibration set has about 352 rows"):
        trainer(wide, tmp_path).train()

    config = T5Config(
        vocab_size=99,
        d_model=16,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    t5 = T5ForSequenceClassification(config)
    hlg.convert(t5)
    with pytest.raises(hlg.HingeError, match=r"the switch cannot make layers wider: .*wi_0.weight has no bias"):
        trainer(t5, tmp_path)
    given = llama()
    with pytest.raises(hlg.HingeError, match="load the model with mlp_bias=True"):
        trainer(given, tmp_path, sgd)
    assert not given.config.mlp_bias
