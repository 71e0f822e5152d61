"""The refit of a mixture of experts, each against numpy on the tokens that the router sends there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.calibration import calibration_set
from support.experts import EXPERTS, experts_model
from support.refit_reference import ridge_regression, which
from support.states import parameters
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit.ridge import RIDGES


@pytest.mark.parametrize(("name", "padding"), [("mixtral", 0), ("mixtral", 4), ("qwen2_moe", 0)])
def test_experts(name: str, padding: int) -> None:
    """Each expert's map against numpy on the tokens that the stock model's router sent there, without those of padding."""
    model = experts_model(name)
    smooth = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXPERTS[name])).eval()
    smooth.load_state_dict(parameters(model))
    relu = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXPERTS[name], hidden_act="relu")).eval()
    batches = calibration_set(model, 24, padded=True)
    batches = [{k: F.pad(v, (0, padding)) for k, v in batch.items()} for batch in batches]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    by_name = {site.name: site for site in report.sites}
    final, tokens = model.state_dict(), sum(int(b["attention_mask"].sum()) for b in batches)
    state = parameters(smooth)
    for layer in range(2):
        relu.load_state_dict(state)
        site = by_name[f"model.layers.{layer}.mlp.experts.act_fn"]
        assert (site.target, site.rows) == ("local", 2 * tokens)
        seen: list[tuple[Tensor, ...]] = []
        experts = relu.model.layers[layer].mlp.experts
        handle = experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        with torch.no_grad():
            for batch in batches:
                relu(**batch)
        handle.remove()
        kept, held = which(smooth, batches, [len(args[0]) for args in seen])
        hidden = torch.cat([args[0] for args in seen]).double()
        routing = torch.cat([args[1] for args in seen])
        before = after = norm = rank = 0.0
        for n in range(5):
            sent = (routing == n).any(1).numpy() & kept
            gate, up = (hidden[sent] @ experts.gate_up_proj[n].detach().double().T).chunk(2, -1)
            down = state[f"model.layers.{layer}.mlp.experts.down_proj"][n].double()
            r, output = (gate.relu() * up).numpy(), ((F.silu(gate) * up) @ down.T).numpy()
            e = output - r @ down.T.numpy()
            fit, judge = ~held[sent], held[sent]
            solutions = [ridge_regression(r[fit], e[fit], ridge, False)[0] for ridge in RIDGES]
            errors = [np.square(e[judge] - r[judge] @ w).sum() for w in solutions]
            best = int(np.argmin(errors))
            wanted, _ = ridge_regression(r, e, RIDGES[best], False)
            values = np.linalg.eigvalsh(r.T @ r).clip(0)
            rank = max(rank, float((values / (values + RIDGES[best] * values.mean())).sum()))
            got = (final[f"model.layers.{layer}.mlp.experts.down_proj"][n].double() - down).T.numpy()
            assert np.abs(got - wanted).max() < 2e-3 * np.abs(wanted).max()
            before, after = before + np.square(e[judge]).sum(), after + errors[best]
            norm += np.square(output[judge]).sum()
        assert site.effective_rank == pytest.approx(rank, rel=1e-3)
        assert site.before == pytest.approx(np.sqrt(before / norm), rel=1e-3)
        assert site.after == pytest.approx(np.sqrt(after / norm), rel=1e-3)
        state.update({k: v for k, v in final.items() if f"layers.{layer}.mlp" in k})


def test_starved_expert() -> None:
    """An expert to which the router sends nothing stays as it was, and it is said; those that batch 0 misses are refit."""
    model = experts_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            for row, factor in enumerate((2.0, 1.5, -2.0, -1.5, 0.0)):  # the last is never among the two best
                layer.mlp.gate.weight[row] = factor
    before = parameters(model)
    batches = [{"input_ids": torch.tensor([[5]])}, *calibration_set(model, 24)]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    for layer, site in enumerate(report.sites):
        assert "1 of 5 experts got too few tokens" in site.note
        assert site.method == "least_squares × 4, none × 1"
        key = f"model.layers.{layer}.mlp.experts.down_proj"
        unchanged = [torch.equal(a, b) for a, b in zip(before[key], model.state_dict()[key], strict=True)]
        assert unchanged == [False] * 4 + [True]
        assert site.after < site.before


def test_expert_without_held_out_tokens() -> None:
    """The error of an expert that could not be refit counts, before and after."""
    model = experts_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # all tokens to the same two
            layer.mlp.gate.weight[1] = 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    report = hlg.relu_ize(model, calibration=[{"input_ids": torch.tensor([[5]])}], compensate="least_squares").compensation
    assert report is not None
    for site in report.sites:
        assert site.method == "none"
        assert site.before == site.after > 0.05
        assert "no rows to fit and to judge by" in site.note
