"""`feed_forward`: the block computes what the model's own does, and is what verification takes, for BERT, ViT, GPT-2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.verification.network import read_network

# the block's own modules: what enters the first is what enters the block, what leaves the last is what leaves it
BLOCKS = {
    "bert-classifier": ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"),
    "vit": ("vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"),
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
}


def sites(model: nn.Module) -> list[str]:
    hlg.convert(model)
    return list(hlg.hardness_sites(model))


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_computes_what_the_model_does(kind: str) -> None:
    model = tiny.build(kind).eval()
    site = next(name for name in sites(model) if name.rpartition(".")[0] == BLOCKS[kind][0].rpartition(".")[0])
    first, last = (dict(model.named_modules())[name] for name in BLOCKS[kind])
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.detach().flatten(0, -2)

    first.register_forward_hook(lambda module, args, output: keep("in", args[0]))
    last.register_forward_hook(lambda module, args, output: keep("out", output))
    block, rows = hlg.feed_forward(model, site)
    assert torch.equal(rows, seen["in"])
    torch.testing.assert_close(block(rows), seen["out"])
    assert not block.training
    assert [type(module) for module in block] == [nn.Linear, hlg.LambdaGELU, nn.Linear]


@pytest.mark.parametrize("kind", ["bert-classifier", "vit"])
@pytest.mark.parametrize("solver", ["highs", "auto"])
def test_a_block_of_a_real_shape_is_verified(kind: str, solver: str) -> None:
    """With a head on it, "robust" holds for what the model's own modules put out; its λ-GELU twin is refused."""
    model = tiny.build(kind).eval()
    site = sites(model)[0]
    smooth, _ = hlg.feed_forward(model, site)
    hlg.relu_ize(model, force=True)
    block, rows = hlg.feed_forward(model, site)
    torch.manual_seed(0)
    head = nn.Linear(block[2].out_features, 3)
    with torch.no_grad():
        head.bias.zero_()
    classifier = nn.Sequential(*block, head).eval()
    labels = classifier(rows[:6]).argmax(1)
    epsilon = 0.1
    report = hlg.verify_robustness(classifier, rows[:6], labels, epsilon, solver=solver)
    assert report.counts["robust"] + report.counts["refuted"] == 6
    assert min(report.counts["robust"], report.counts["refuted"]) > 0
    for row, verdict in zip(rows, report.verdicts, strict=False):
        points = row + epsilon * (2 * torch.rand(2000, len(row)) - 1)
        if verdict.verdict == "robust":
            assert (head(block(points)).argmax(1) == verdict.label).all()
    with pytest.raises(ValueError, match=r"1 \(LambdaGELU\) is smooth"):
        hlg.verify_robustness(nn.Sequential(*smooth, head), rows[:6], labels, epsilon)


@pytest.mark.parametrize("kind", ["bert-classifier", "vit"])
def test_the_distance_of_a_block(kind: str) -> None:
    model = tiny.build(kind).eval()
    site = sites(model)[0]
    tiny.set_hardness(model, 20.0)
    smooth, rows = hlg.feed_forward(model, site)
    report = hlg.certified_distance(smooth, rows[:3], 0.1)
    hlg.relu_ize(model, force=True)
    block, _ = hlg.feed_forward(model, site)
    assert report == hlg.certified_distance(smooth, rows[:3], 0.1, relu=block)
    for row, bound in zip(rows, report.bounds, strict=False):
        points = row.double() + 0.1 * (2 * torch.rand(2000, len(row), dtype=torch.float64) - 1)
        with torch.no_grad():
            exact = [copy.deepcopy(part).double()(points) for part in (block, smooth)]
        assert float((exact[0] - exact[1]).abs().max()) <= bound < 0.1


def test_the_block_is_a_copy_and_the_model_as_it_was() -> None:
    model = tiny.build("bert-classifier").train()
    site = sites(model)[0]
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    block, _ = hlg.feed_forward(model, site)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gated_block_is_refused() -> None:
    model = tiny.build("llama").eval()
    site = sites(model)[0]
    with pytest.raises(ValueError, match=r"no linear map takes up what leaves .* \(in a gated block it is multiplied"):
        hlg.feed_forward(model, site)


@pytest.mark.parametrize(
    ("model", "site", "inputs", "message"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "2", torch.zeros(1, 2), "no activation called '2': the model has 1"),
        (nn.Sequential(nn.Linear(2, 3)), "0", torch.zeros(1, 2), "no activation called '0': the model has none"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "1", None, "no inputs can be guessed for Sequential: pass inputs"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "1", torch.zeros(1, 2), "no linear map takes up what leaves 1"),
        (
            nn.Sequential(nn.LayerNorm(2), nn.ReLU(), nn.Linear(2, 2)),
            "1",
            torch.ones(1, 2),
            "what enters 1 is no linear map's output as it is",
        ),
    ],
)
def test_bad_input(model: nn.Module, site: str, inputs: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hlg.feed_forward(model, site, inputs)


def test_what_is_read_is_exactly_the_model() -> None:
    """In half precision too: the weights are the stored ones."""
    model = tiny.build("bert-classifier").to(torch.bfloat16).eval()
    site = sites(model)[0]
    hlg.relu_ize(model, force=True)
    block, rows = hlg.feed_forward(model, site)
    assert rows.dtype == block[0].weight.dtype == torch.bfloat16
    layer = model.bert.encoder.layer[0]
    assert (read_network(block)[0].weight == layer.intermediate.dense.weight.detach().double().numpy()).all()
    assert (read_network(block)[1].bias == layer.output.dense.bias.detach().double().numpy()).all()


def test_a_real_block(asset: Callable[[str], Path]) -> None:
    """Of MiniLM, 384 features and 1,536 units: bounds decide, and the distance holds for samples."""
    model = AutoModel.from_pretrained(asset("minilm")).eval()
    batch = AutoTokenizer.from_pretrained(asset("minilm"))(["a quiet film that stays with you"], return_tensors="pt")
    hlg.convert(model)
    site = list(hlg.hardness_sites(model))[-1]
    smooth, rows = hlg.feed_forward(model, site, batch)
    hlg.relu_ize(model, force=True)
    block, _ = hlg.feed_forward(model, site, batch)
    torch.manual_seed(0)
    probe = nn.Sequential(*block, nn.Linear(384, 2)).eval()
    report = hlg.verify_robustness(probe, rows[:2], probe(rows[:2]).argmax(1), 0.001, time_limit=1e-9)
    assert report.counts["robust"] == 2
    distance = hlg.certified_distance(smooth, rows[:1], 0.001, relu=block)
    assert 0.5 < distance.measured[0] / distance.bounds[0] <= 1.0
