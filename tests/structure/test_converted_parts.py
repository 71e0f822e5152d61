"""A part of a transformers model that was converted by itself: what the config of the whole says of it is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny
from support.stock import stock_outputs
from support.training import Rows, arguments
from transformers import Trainer, TrainingArguments

import hf_lambda_gelu as hlg

# model → its part, the config attribute of the whole that governs the part, and the key that must stand there
PARTS = {
    "bert-classifier": ("bert", "", "hidden_act", "lambda_gelu"),
    "llama": ("model", "", "hidden_act", "lambda_silu"),
    "clip": ("vision_model", "vision_config", "hidden_act", "lambda_quick_gelu"),
}


@pytest.mark.parametrize("name", PARTS)
def test_of_the_whole(name: str, tmp_path: Path) -> None:
    """relu_ize says what to set; then the whole is substituted and saved as if it had been converted."""
    part, owner, attribute, key = PARTS[name]
    model = tiny.build(name)
    batch = tiny.inputs(model)
    hlg.convert(model.get_submodule(part))
    tiny.set_hardness(model, 1e4)
    expected, before = tiny.outputs(model, batch), tiny.snapshot(model)
    path = f"{owner}.{attribute}" if owner else attribute
    with pytest.raises(ValueError, match=rf"config\.{path} = '\w+' governs {part}\..* Set {path} of its config to '{key}'"):
        hlg.relu_ize(model)
    assert tiny.snapshot(model) == before
    setattr(getattr(model.config, owner) if owner else model.config, attribute, key)
    report = hlg.relu_ize(model)
    assert report.folded == {}
    assert report.attributes == {path: key}
    if name == "clip":  # half of it is smooth
        model.save_pretrained(tmp_path / "relu")
    else:
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    stock = stock_outputs({"relu": (type(model).__name__, batch)}, tmp_path)["relu"]
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) == 0.0
    assert tiny.relative_difference(expected, stock) <= 1e-3


def test_saved_after_the_part_alone(tmp_path: Path) -> None:
    """The part is ReLU, and stock transformers would build GELU: the refusal says what to set."""
    model = tiny.build("bert-classifier")
    batch = tiny.inputs(model)
    hlg.convert(model.bert)
    hlg.relu_ize(model.bert, force=True)
    with pytest.raises(ValueError, match=r"hidden_act = 'gelu', and bert\..* is ReLU: a part .* Set 'relu' there"):
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    model.config.hidden_act = "relu"
    hlg.save_relu_pretrained(model, tmp_path / "relu")
    stock = stock_outputs({"relu": (type(model).__name__, batch)}, tmp_path)["relu"]
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) == 0.0


def test_told_before_training(tmp_path: Path) -> None:
    """Checkpoints of the whole would hold λ under a config that builds GELU."""
    model = tiny.build("bert-classifier")
    hlg.convert(model.bert)
    with pytest.raises(ValueError, match=r"is λ-GELU: a part of BertForSequenceClassification was converted by itself"):
        hlg.LambdaGELUTrainer(model, arguments(tmp_path), train_dataset=Rows())
    optimizers = (torch.optim.AdamW(hlg.parameter_groups(model), lr=1e-4), None)
    run = Trainer(
        model,
        arguments(tmp_path, TrainingArguments),
        train_dataset=Rows(),
        optimizers=optimizers,
        callbacks=[hlg.HardnessCallback()],
    )
    with pytest.raises(ValueError, match="was converted by itself"):
        run.train()
