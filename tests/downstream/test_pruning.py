"""`prune_dead_units` against networks in which the same units weigh nothing, and stock transformers on what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from support.dead_units import batches, close, kill, outputs, rows
from support.models import relu_model
from torch import nn
from transformers import AutoModel, AutoTokenizer, EncoderDecoderConfig, EncoderDecoderModel

import hf_lambda_gelu as hlg

# name → its FFNs that have one width, their maps before the ReLU and after it, and the config path of the width
FFNS: dict[str, tuple[list[str], list[str], str, str]] = {
    "bert": (
        ["bert.encoder.layer.0", "bert.encoder.layer.1"], ["intermediate.dense"], "output.dense", "intermediate_size",
    ),
    "vit": (["vit.layers.0.mlp", "vit.layers.1.mlp"], ["fc1"], "fc2", "intermediate_size"),
    "gpt2": (["transformer.h.0.mlp", "transformer.h.1.mlp"], ["c_fc"], "c_proj", "n_inner"),
    "llama": (["model.layers.0.mlp", "model.layers.1.mlp"], ["gate_proj", "up_proj"], "down_proj", "intermediate_size"),
    "t5": (
        [f"{side}.block.{i}.layer.{j}.DenseReluDense" for side, j in (("encoder", 1), ("decoder", 2)) for i in (0, 1)],
        ["wi_0", "wi_1"], "wo", "d_ff",
    ),
    "whisper": (["model.decoder.layers.0", "model.decoder.layers.1"], ["fc1"], "fc2", "decoder_ffn_dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FFNS))
def test_stock_transformers_loads_a_smaller_network(name: str, tmp_path: Path) -> None:
    """Units that are dead in each layer, more in the first: all keep as many as the last needs, and outputs stay."""
    places, before, after, path = FFNS[name]
    model = relu_model(name)
    for place in places:
        kill(model, f"{place}.{before[0]}", [1, 2, 36])
    kill(model, f"{places[0]}.{before[0]}", [0, 3, 4, 9, 30])
    data = batches(model)
    dead = {site.name: len(site.dead) for site in hlg.activation_sparsity(model, data).sites}
    expected = [outputs(model, batch) for batch in data]
    parameters, width = (
        sum(p.numel() for p in model.parameters()),
        len(rows(model.get_submodule(f"{places[0]}.{before[0]}"))),
    )

    report = hlg.prune_dead_units(model, iter(data))

    assert {site.name: site.dead for site in report.sites} == {site.name: dead[site.name] for site in report.sites}
    removed = min(dead[site.name] for site in report.sites if any(site.name.startswith(place) for place in places))
    assert removed >= 3
    assert report.widths == {path: (width, width - removed)}
    assert getattr(model.config, path) == width - removed
    for place in places:
        assert {len(rows(model.get_submodule(f"{place}.{b}"))) for b in before} == {width - removed}
        assert rows(model.get_submodule(f"{place}.{after}")).shape[1] == width - removed
    assert report.parameters == (parameters, sum(p.numel() for p in model.parameters()))
    for batch, wanted in zip(data, expected, strict=True):
        close(wanted, outputs(model, batch))
    hlg.save_relu_pretrained(model, tmp_path / "pruned")
    reloaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    for batch in batches(model, 4):
        close(outputs(model, batch), outputs(reloaded, batch), 0.0)


def test_the_right_units() -> None:
    """On data on which removed units would fire: the network in which they put out 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    data = [torch.randn(5, 6) for _ in range(2)]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        x = torch.cat(data)
        for first, second in ((0, 2), (2, 4)):
            h = x = reference[first](x).clamp(min=0)
            reference[second].weight[:, (h == 0).all(0)] = 0
            assert 0 < (h == 0).all(0).sum() < h.shape[1]
    report = hlg.prune_dead_units(model, data)
    assert [s.kept for s in report.sites] == [s.units - s.dead for s in report.sites]
    assert [model[0].out_features, model[2].in_features, model[2].out_features] == [
        report.sites[0].kept, report.sites[0].kept, report.sites[1].kept,
    ]  # fmt: skip
    other = torch.randn(1000, 6) * 3
    torch.testing.assert_close(model(other), reference(other), rtol=1e-5, atol=1e-6)


def test_a_layer_that_runs_three_times(tmp_path: Path) -> None:
    """ALBERT's layers share one FFN: a unit that fires in any of its calls stays."""
    model = relu_model("albert")
    kill(model, "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn", [5, 6])
    data = batches(model)
    expected = [outputs(model, batch) for batch in data]
    report = hlg.prune_dead_units(model, data)
    assert report.widths == {"intermediate_size": (37, 35)}
    for batch, wanted in zip(data, expected, strict=True):
        close(wanted, outputs(model, batch))
    model.save_pretrained(tmp_path)
    close(outputs(model, data[0]), outputs(type(model).from_pretrained(tmp_path).eval(), data[0]), 0.0)


def test_gate_and_up_in_one_map(tmp_path: Path) -> None:
    """Of ModernBERT's Wi a unit has two rows, which go together; what is left is of units that fire."""
    model = relu_model("modernbert")
    layers = [layer.mlp for layer in model.model.layers]
    for mlp in layers:
        kill(mlp, "Wi", [1, 2, 36])  # rows of the gate
    data = batches(model)
    expected = [outputs(model, batch) for batch in data]
    dead = [len(site.dead) for site in hlg.activation_sparsity(model, data).sites[:2]]
    gates, ups = layers[0].Wi.weight.detach().clone().chunk(2)
    report = hlg.prune_dead_units(model, data)
    now = 37 - min(dead)
    assert report.widths == {"intermediate_size": (37, now)}
    assert now <= 34
    assert (layers[0].Wi.out_features, layers[0].Wo.in_features) == (2 * now, now)
    left = zip(*layers[0].Wi.weight.detach().chunk(2), strict=True)
    pairs = {(g.numpy().tobytes(), u.numpy().tobytes()) for g, u in zip(gates, ups, strict=True)}
    assert {(g.numpy().tobytes(), u.numpy().tobytes()) for g, u in left} <= pairs
    for batch, wanted in zip(data, expected, strict=True):
        close(wanted, outputs(model, batch))
    hlg.save_relu_pretrained(model, tmp_path / "pruned")
    reloaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    close(outputs(model, data[0]), outputs(reloaded, data[0]), 0.0)


def test_convolutions() -> None:
    """Of 1×1 convolutions with as many channels as positions, channels go, and of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    kill(model, "0", [2, 5])
    data = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    expected = [model(x) for x in data]
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    report = hlg.prune_dead_units(model, data)
    left = [0, 1, 3, 4, 6, 7]
    assert (report.sites[0].units, report.sites[0].kept) == (8, 6)
    assert (model[0].out_channels, model[2].in_channels) == (6, 6)
    assert torch.equal(model[0].weight, weights[0][left])
    assert torch.equal(model[2].weight, weights[1][:, left])
    close(expected, [model(x) for x in data])


def test_two_configs_of_one_class() -> None:
    """BERT to BERT: the decoder's width is its own, though it is the same number."""
    config = tiny.build("bert", hidden_act="relu").config
    torch.manual_seed(0)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, config)).eval()
    for layer in (0, 1):
        kill(model, f"encoder.encoder.layer.{layer}.intermediate.dense", [7])
        model.get_submodule(f"decoder.bert.encoder.layer.{layer}.intermediate.dense").bias.data.fill_(9.0)
    ids = torch.arange(10).reshape(2, 5)
    report = hlg.prune_dead_units(model, [{"input_ids": ids, "decoder_input_ids": ids}])
    assert list(report.widths) == ["encoder.intermediate_size"]
    width = len(model.encoder.encoder.layer[1].intermediate.dense.weight)
    assert width < 37
    assert (model.config.encoder.intermediate_size, model.config.decoder.intermediate_size) == (width, 37)
    assert (model.encoder.config.intermediate_size, model.decoder.config.intermediate_size) == (width, 37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Sums without the zeros may be rounded otherwise, and that is all."""
    model = relu_model("llama").to(dtype)
    for layer in (0, 1):
        kill(model, f"model.layers.{layer}.mlp.gate_proj", list(range(10)))
    data = batches(model)
    expected = outputs(model, data[0])
    report = hlg.prune_dead_units(model, data)
    assert report.widths == {"intermediate_size": (37, 27)}
    assert {p.dtype for p in model.parameters()} == {dtype}
    close(expected[:1], outputs(model, data[0])[:1], 4 * torch.finfo(dtype).eps)


def test_hooks_and_a_graph_that_is_alive() -> None:
    """Hooks on parameters and modules go on with the smaller shapes, also where a graph from before is still there."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    kill(model, "0", [2, 5])
    first, seen = model[0].weight, []
    first.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    first.register_post_accumulate_grad_hook(lambda parameter: seen.append(tuple(parameter.grad.shape)))
    model[2].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    x = torch.rand(3, 4) + 1
    alive = model(x).sum()
    alive.backward(retain_graph=True)
    assert seen == [(3, 8), (8, 4), (8, 4)]
    with torch.no_grad():
        rows(model[0])[[0, 1, 3, 4, 6, 7]] = 1.0
        model[0].bias.clamp_(max=-1)
        model[0].bias[[0, 1, 3, 4, 6, 7]] = 1.0
    hlg.prune_dead_units(model, [x])
    assert model[0].weight is first
    assert first.grad is None
    seen.clear()
    model(x).sum().backward()
    assert seen == [(3, 6), (6, 4), (6, 4)]
    assert {p.grad.shape == p.shape for p in model.parameters()} == {True}


def test_all_dead_keeps_one() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    kill(model, "0", list(range(8)))
    report = hlg.prune_dead_units(model, [torch.rand(3, 4)])
    assert (report.sites[0].dead, report.sites[0].kept) == (8, 1)
    assert model[0].weight.shape == (1, 4)
    torch.testing.assert_close(model(torch.rand(2, 4)), model[2].bias.expand(2, 2))


def test_report_as_json() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    kill(model, "0", [2, 5])
    report = hlg.prune_dead_units(model, [torch.rand(30, 4) + torch.eye(4).repeat(8, 1)[:30]])
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["sites"][0]["units"] == 8
    assert record["parameters"][0] - record["parameters"][1] == 7 * (8 - record["sites"][0]["kept"])
    assert str(report).splitlines()[2].split() == ["1", "8", str(report.sites[0].dead), str(report.sites[0].kept)]


def test_a_real_model(asset: Callable[[str], Path], tmp_path: Path) -> None:
    """Of MiniLM with ReLU, on two texts, many units never fire; stock transformers loads what is left."""
    folder = asset("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    batch = dict(tokenizer(["a quiet film that stays with you", "dull"], padding=True, return_tensors="pt"))
    expected = outputs(model, batch)
    report = hlg.prune_dead_units(model, [batch])
    assert report.parameters[1] < report.parameters[0]
    close(expected, outputs(model, batch), 1e-5)
    model.save_pretrained(tmp_path)
    close(outputs(model, batch), outputs(AutoModel.from_pretrained(tmp_path).eval(), batch), 0.0)
