"""Blocks that torch stands around, by torch.compile or activation checkpointing, are governed by the config as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from support.stock import stock_outputs
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg

AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "_orig_mod": lambda block: torch.compile(block, backend="eager"),
    "_checkpoint_wrapped_module": checkpoint_wrapper,
}


def wrapped(model: PreTrainedModel, inside: str) -> PreTrainedModel:
    for index, block in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = AROUND[inside](block)
    return model


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("inside", AROUND)
def test_refit(inside: str, late: bool, tmp_path: Path) -> None:
    """Converted before or after: each site is found, none counts as hard-coded, the refit is that of the plain model."""
    torch.compiler.reset()
    plain, model = tiny.build("bert-classifier"), tiny.build("bert-classifier")
    batches = [tiny.inputs(plain, seed) for seed in range(6)]
    hlg.convert(plain)
    if late:
        hlg.convert(model)
        wrapped(model, inside)
    else:
        report = hlg.convert(wrapped(model, inside))
        assert [site.attribute for site in report.sites] == ["hidden_act"] * 2
    assert all(f".{inside}." in name for name in hlg.hardness_sites(model))
    expected = hlg.relu_ize(plain, calibration=batches, compensate="least_squares")
    found = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert found.folded == {}
    assert found.attributes == expected.attributes == {"hidden_act": "lambda_gelu"}
    assert found.relative_change == expected.relative_change
    state = {name.replace(f"{inside}.", ""): value for name, value in model.state_dict().items()}
    assert [name for name, value in plain.state_dict().items() if not torch.equal(state[name], value)] == []
    if inside == "_orig_mod":  # whose names transformers would not know
        with pytest.raises(ValueError, match="replaced or wrapped after it was built"):
            hlg.save_relu_pretrained(model, tmp_path / "relu")
    else:
        hlg.save_relu_pretrained(model, tmp_path / "relu")
        stock = stock_outputs({"relu": (type(model).__name__, batches[0])}, tmp_path)["relu"]
        assert tiny.relative_difference(tiny.outputs(model, batches[0]), stock) == 0.0
