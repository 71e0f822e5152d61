"""Adapters: λ trains beside them, is in checkpoints, and merging leaves a plain ReLU model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from support import tiny
from support.stock import stock_outputs
from transformers import TrainerCallback

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.adapter_hardness import _save_pretrained

STEPS, SAVED = 8, 4
PROMPT = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
LORA = {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "r": 4, "init_lora_weights": False}


def adapted(seed: int = 0, config: PeftConfig | None = None) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(tiny.build("bert-classifier"), config or LoraConfig(**LORA)).eval()


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (32, 8), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 1] > 50).long().tolist()})


def trainer(model: PeftModel, folder: Path, evaluated: Dataset | None = None, **more: Any) -> hlg.LambdaGELUTrainer:
    arguments = hlg.LambdaGELUTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        hardness_learning_rate=0.05,
        report_to="none",
        disable_tqdm=True,
        **{"hardness_compensate": "none", "save_strategy": "no", **more},
    )
    return hlg.LambdaGELUTrainer(model, arguments, train_dataset=rows(), eval_dataset=evaluated)


class Stop(TrainerCallback):
    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_convert_train_merge(tmp_path: Path) -> None:
    """Base weights stay, λ and adapters move; hardened, substituted and merged, stock transformers computes the same."""
    model = adapted()
    batch = tiny.inputs(model.get_base_model())
    expected = tiny.outputs(model, batch)
    report = hlg.convert(model)
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) <= 1e-5
    assert {site.attribute for site in report.sites} == {"base_model.model.hidden_act"}
    tiny.set_hardness(model, 1.5)
    start = {name: p.clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path / "run", hardness_switch_point=0.75)
    run.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {n for n in start if "lora_" in n or "modules_to_save" in n or n.endswith("unclipped_hardness")}
    assert all(abs(value - 1.5) > 1e-3 for value in run.learned_hardness.values())
    hard = tiny.outputs(model.eval(), batch)
    with pytest.raises(ValueError, match=r"has adapters.*merge_and_unload"):
        hlg.save_relu_pretrained(model, tmp_path / "adapters")
    hlg.relu_ize(model)
    merged = model.merge_and_unload()
    assert merged.config.hidden_act == "relu"
    hlg.save_relu_pretrained(merged, tmp_path / "merged")
    stock = stock_outputs({"merged": (type(merged).__name__, batch)}, tmp_path)["merged"]
    assert tiny.relative_difference(hard, stock) <= 1e-3


@pytest.mark.parametrize(("switch", "config"), [(0.25, None), (0.75, None), (0.75, PROMPT)])
def test_resuming(tmp_path: Path, switch: float, config: PeftConfig | None) -> None:
    """Checkpoints hold adapters, or prompts, and λ in a file beside them, to the bit."""
    twin_model = adapted(config=config)
    hlg.convert(twin_model, init_hardness=1.5)
    twin = trainer(twin_model, tmp_path / "twin", hardness_switch_point=switch)
    twin.train()
    saving = {"save_strategy": "steps", "save_steps": SAVED, "hardness_switch_point": switch}
    for seed in (0, 9):  # the interrupted run; a new process, whose adapters are others until they are loaded
        model = adapted(seed, config)
        hlg.convert(model, init_hardness=1.0 if seed else 1.5)
        run = trainer(model, tmp_path / "run", **saving)
        if seed == 0:
            run.add_callback(Stop())
            with pytest.raises(KeyboardInterrupt):
                run.train()
        else:
            run.train(resume_from_checkpoint=True)
    expected = twin_model.state_dict()
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])]
    assert run.learned_hardness == twin.learned_hardness


def test_a_save_that_stops_leaves_no_hardness_of_other_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an older folder: new adapters beside the λ of the old ones would load without a word."""
    model = adapted()
    hlg.convert(model, init_hardness=2.0)
    model.save_pretrained(tmp_path)
    tiny.set_hardness(model, 9.0)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lambda_gelu.surgery.adapter_hardness.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="lambda_gelu_hardness"):
        hlg.load_hardness(model, tmp_path)


@pytest.mark.parametrize("copied", [False, True])
def test_saved_beside_adapters(tmp_path: Path, copied: bool, caplog: pytest.LogCaptureFixture) -> None:
    """λ of the model that was saved, said at the first save; on a fresh base, converted, the function comes back."""
    base = tiny.build("bert-classifier")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA)).eval()
    hlg.convert(model)
    model = copy.deepcopy(model) if copied else model
    tiny.set_hardness(model, 5.3, step=0.4)
    batch = tiny.inputs(model.get_base_model())
    _save_pretrained.__globals__["logger"].warning_once.cache_clear()
    model.save_pretrained(tmp_path / "adapters")
    assert "do not hold λ: it is in lambda_gelu_hardness.safetensors" in caplog.text
    found = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapters").eval()
    hlg.convert(found)
    assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(found, batch)) > 1e-3
    hlg.load_hardness(found, tmp_path / "adapters")
    assert hlg.hardness_profile(found) == hlg.hardness_profile(model)
    assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(found, batch)) <= 1e-6


def test_no_hardness_for_this_model(tmp_path: Path) -> None:
    """λ of other places, or none: named, and the model is as it was."""
    model = adapted()
    hlg.convert(model)
    before = tiny.snapshot(model)
    (tmp_path / "none").mkdir()
    with pytest.raises(OSError, match=r"lambda_gelu_hardness\.safetensors"):
        hlg.load_hardness(model, tmp_path / "none")
    other = get_peft_model(tiny.build("bert-classifier", num_hidden_layers=1), LoraConfig(**LORA))
    hlg.convert(other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds λ of .* 1 in all; the model has λ-GELU at .* 2 in all"):
        hlg.load_hardness(model, tmp_path / "other")
    assert tiny.snapshot(model) == before


def test_the_best_model_has_its_hardness(tmp_path: Path) -> None:
    """Trainer loads the best checkpoint's adapters at the end: λ comes with them."""
    model = adapted()
    hlg.convert(model)
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_relu_loss"}
    run = trainer(model, tmp_path, hardness_switch_point=0.25, evaluated=rows(), **saving, **best)
    run.train()
    folder = Path(run.state.best_model_checkpoint)
    stored = load_file(folder / "lambda_gelu_hardness.safetensors")
    assert hlg.hardness_profile(model) == {name: value.item() for name, value in stored.items()}


@pytest.mark.parametrize("config", [None, PROMPT])
def test_told_before_it_starts(tmp_path: Path, config: PeftConfig | None, caplog: pytest.LogCaptureFixture) -> None:
    """A refit of base weights, which no checkpoint would hold; λ that PEFT froze."""
    model = adapted(config=config)
    hlg.convert(model)
    with pytest.raises(ValueError, match=r"refits base weights, which checkpoints of adapters do not hold"):
        trainer(model, tmp_path, hardness_compensate="least_squares")

    base = tiny.build("bert-classifier")
    hlg.convert(base)
    trainer(get_peft_model(base, config or LoraConfig(**LORA)), tmp_path)
    assert "λ of 2 sites is frozen" in caplog.text
