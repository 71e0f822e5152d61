"""Refits of pruned weights against numpy, output by output, and through `relu_ize`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, MixtralConfig, MixtralModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import pruned
from hf_lambda_gelu.surgery.refit.ridge import Moments, solve

D, K, N = 24, 16, 400


def masks() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    random = torch.rand(D, K, generator=draw) < 0.5
    two_of_four = torch.rand(D // 4, 4, K, generator=draw).argsort(1).argsort(1).reshape(D, K) < 2
    rows, columns, blocks = (torch.ones(D, K, dtype=torch.bool) for _ in range(3))
    rows[::3], columns[:, ::2], blocks[:12, :8] = False, False, False
    few, many = (torch.rand(D, K, generator=draw) < share for share in (0.9, 0.1))
    return {
        "few pruned": few,
        "most pruned": many,
        "random": random,
        "2:4": two_of_four,
        "rows": rows,
        "columns": columns,
        "blocks": blocks,
    }


@pytest.mark.parametrize("name", list(masks()))
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("ridge", [0.001, 1.0])
def test_against_a_solve_for_each_output(name: str, biased: bool, ridge: float) -> None:
    """Each column alone, with the bias as one more, unpenalised, feature."""
    draw = np.random.default_rng(0)
    r = (draw.normal(size=(N, 6)) @ draw.normal(size=(6, D)) + 0.1 * draw.normal(size=(N, D))).clip(
        0
    ) + 0.5  # ill-conditioned
    e = draw.normal(size=(N, K)) + r @ draw.normal(size=(D, K)) * 0.1 + 1.0
    kept = masks()[name]
    moments = Moments.empty(D, K, torch.device("cpu"))
    moments.add(torch.from_numpy(r), torch.from_numpy(e))
    change = solve(moments, "least_squares", biased=biased, ridge=ridge, kept=kept)
    assert change.weight is not None
    assert not change.weight[~kept].any()

    centred = r - r.mean(0) if biased else r
    penalty = ridge * np.trace(centred.T @ centred) / D
    for j in range(K):
        on = kept[:, j].numpy()
        features = np.hstack([r[:, on], np.ones((N, 1))]) if biased else r[:, on]
        weights = np.diag([penalty] * on.sum() + [0.0] * biased)
        expected = np.linalg.solve(features.T @ features + weights, features.T @ e[:, j])
        np.testing.assert_allclose(change.weight[kept[:, j], j].numpy(), expected[: on.sum()], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(float(change.bias[j]), expected[-1] if biased else 0.0, rtol=1e-6, atol=1e-8)


def bert() -> tuple[nn.Module, str]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=99, **sizes)), "encoder.layer.0.output.dense.weight"


def gpt2() -> tuple[nn.Module, str]:
    """Whose Conv1D keeps the weight the other way round."""
    return GPT2Model(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)), "h.0.mlp.c_proj.weight"


def mixtral() -> tuple[nn.Module, str]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = MixtralModel(MixtralConfig(vocab_size=99, num_key_value_heads=2, num_local_experts=2, **sizes))
    return model, next(n for n, p in model.named_parameters() if n.endswith("down_proj") and p.dim() == 3)


@pytest.mark.parametrize("build", [bert, gpt2, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_of_a_pruned_weight_stay(build, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """And the rest is refit; the report says so of this site and of no other."""
    torch.manual_seed(0)
    model, name = build()
    model = model.eval().to(dtype)
    weight = model.get_parameter(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        weight[torch.rand(weight.shape) < 0.5] = 0
    zeros, before = weight == 0, weight.detach().clone()
    hlg.convert(model)
    batches = [{"input_ids": torch.randint(3, 99, (8, 9))} for _ in range(6)]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    site = next(s for s in report.sites if s.weight == name)
    assert site.method.startswith("least_squares")
    assert not weight[zeros].any()
    assert not torch.equal(weight, before)
    of_each_expert = zeros.double().mean((-2, -1)).max()
    assert f"pruned: {100 * float(of_each_expert):.0f} % of the weight kept at 0" in site.note
    assert all("pruned" not in s.note for s in report.sites if s.weight != name)
    assert site.after < site.before


def test_what_is_not_pruned() -> None:
    """A zero by chance, and a weight that is 0 throughout, are refit without a mask."""
    linear = nn.Linear(20, 10)
    made = pruned.LinearMap("weight", linear.weight, linear.bias, None, False)
    for change, is_pruned in ((None, False), ((0, 0), False), ((0,), True), ((), False)):
        with torch.no_grad():
            linear.weight.fill_(1.0)
            if change is not None:
                linear.weight[change] = 0.0
        assert (pruned.support(made) is not None) == is_pruned
