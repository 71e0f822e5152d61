"""The smooth and the refit network in one model: exchanged, frozen, with biases that are added and taken away."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from support.models import converted
from support.states import full_snapshot, largest_difference, parameters
from transformers import LlamaForCausalLM

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import engine, two_networks


def test_added_biases_reload(tmp_path: Path) -> None:
    """Llama's `mlp_bias`, switched on, is in the saved config: a stock load misses nothing and computes the same."""
    model = converted("llama")
    shared = model.config
    report = hlg.relu_ize(model, calibration=calibration_set(model), compensate="least_squares").compensation
    assert report is not None
    assert "config.mlp_bias is True now" in str(report)
    assert (model.config.mlp_bias, shared.mlp_bias) == (True, False)  # a config that another model may hold
    model.save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.model.layers[1].mlp.down_proj.bias.abs().max() > 0.0
    assert loaded.model.layers[1].mlp.gate_proj.bias.abs().max() == 0.0
    batch = tiny.inputs(model)
    assert tiny.relative_difference(tiny.outputs(loaded, batch), tiny.outputs(model, batch)) == 0.0


def test_no_biases() -> None:
    """Where no new biases are wanted, Llama's maps get new weights alone, and the config stays as it is."""
    model = converted("llama")
    before, batches = full_snapshot(model), calibration_set(model)
    with tempfile.TemporaryDirectory() as folder:
        networks = two_networks.TwoNetworks(model, Path(folder))
        networks.batches.keep(batches)
        report = engine.Refit(networks).run("least_squares", biases=False)
        assert report.bias_attribute is None
        assert all("weights only: the map has no bias" in site.note for site in report.sites)
        assert all(site.method == "least_squares" for site in report.sites)
        assert {n: id(p) for n, p in model.named_parameters()} == {n: v[0] for n, v in before["parameters"].items()}
        assert model.config.to_dict() == before["config"]
        networks.undo()
    assert full_snapshot(model) == before


def test_smooth_network_of_a_refit_model() -> None:
    """`smooth` gives the weights of before, however often it is entered, and the refit ones on leaving; half-way through an
    exchange, where a signal may come, `undo` still restores the smooth network.
    """
    model = converted("bert-classifier")
    before = full_snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        work = two_networks.TwoNetworks(model, Path(folder))
        work.batches.keep(calibration_set(model, 6))
        engine.Refit(work).run("least_squares")
        assert len(work.originals) == 4
        refit = {p: p.data_ptr() for p in work.originals}
        changed = tiny.snapshot(model)["tensors"]
        assert changed != before["tensors"]
        with work.smooth(), work.smooth():
            assert tiny.snapshot(model)["tensors"] == before["tensors"]
        assert {p: p.data_ptr() for p in refit} == refit
        assert tiny.snapshot(model)["tensors"] == changed
        exchange = work.smooth()
        exchange.__enter__()
        next(iter(refit)).data = torch.zeros(1)
        work.undo()
    assert full_snapshot(model) == before


@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_frozen_and_in_training(name: str) -> None:
    """Frozen parameters are refit and stay frozen, added ones are frozen as their layer is; objects and modes are kept."""
    model = converted(name).train()
    frozen = {n for n, _ in model.named_parameters() if "layers.0" in n or "layer.0" in n}
    for n, parameter in model.named_parameters():
        parameter.requires_grad_(n not in frozen)
    model.get_submodule("dropout" if name == "bert-classifier" else "lm_head").eval()
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters() if not n.endswith("unclipped_hardness")}
    reference = converted(name)
    batches = calibration_set(model)
    hlg.relu_ize(reference, calibration=batches, compensate="least_squares")
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    after = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    assert before.items() <= after.items()
    assert {n.partition("mlp.")[2] for n in after.keys() - before.keys()} == (
        {"gate_proj.bias", "up_proj.bias", "down_proj.bias"} if name == "llama" else set()
    )
    assert all(flag == ("layers.0" not in n) for n, (_, flag) in after.items() if n not in before)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    assert largest_difference(parameters(reference), parameters(model)) == 0.0
