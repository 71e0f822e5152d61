"""The linear maps that take up each site, against tables that were read off the modelling code by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support import tiny
from support.experts import EXPERTS, experts_model
from support.handmade import embeds, handmade
from support.models import converted
from support.site_tables import WHERE, both
from support.states import hooks
from support.traced import found
from support.versions import OLDER_TRANSFORMERS
from torch import Tensor

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.linear_maps import eager_experts
from hf_lambda_gelu.structure.tracing import trace

_TIED = "the weight that it feeds is shared with {}.weight"

OBSTACLES: dict[str, dict[str, str]] = {
    "bert": {"cls.predictions.transform.transform_act_fn": _TIED.format("cls.predictions.decoder")},
    "distilbert": {"activation": _TIED.format("vocab_projector")},
    "albert": {"predictions.activation": _TIED.format("predictions.decoder")},
    "modernbert": {"head.act": _TIED.format("decoder")},
    "wav2vec2": {
        # added to the stream before all layers
        "wav2vec2.encoder.pos_conv_embed.activation": "it feeds several linear maps: "
        + ", ".join(
            ["lm_head.weight"]
            + [
                f"wav2vec2.encoder.layers.{n}.{m}.weight"
                for n in range(2)
                for m in (
                    "attention.k_proj",
                    "attention.q_proj",
                    "attention.v_proj",
                    "feed_forward.intermediate_dense",
                )
            ]
        ),
    },
}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_maps(name: str) -> None:
    """Site → parameters against the table, in the order of the forward; obstacles word for word; nothing changes."""
    model = converted(name)
    before, outputs = tiny.snapshot(model), tiny.outputs(model, tiny.inputs(model))
    flags = {n: (p.requires_grad, p.grad, id(p)) for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    result = found(model)
    wanted = {site: taker for where in WHERE[name] for site, taker in zip(both(where.site), both(where.taker), strict=True)}
    assert {site: [m.label for m in maps] for site, maps in result.maps.items()} == {
        s: [f"{t}.weight"] for s, t in wanted.items()
    }
    assert [site for site in result.order if site in result.maps] == list(wanted)
    assert result.obstacles == OBSTACLES.get(name, {})
    assert set(result.order) == set(hlg.hardness_sites(model)) == set(wanted) | set(result.obstacles)
    for site, (m,) in result.maps.items():
        module = model.get_submodule(wanted[site])
        assert m.parameter is module.weight
        assert m.bias is getattr(module, "bias", None)
        assert m.transposed == (name == "gpt2")
        flat = m.parameter.flatten(1)
        assert m.shape == (tuple(flat.shape) if m.transposed else tuple(reversed(flat.shape)))
        assert m.index is None
    assert tiny.snapshot(model) == before
    assert {n: (p.requires_grad, p.grad, id(p)) for n, p in model.named_parameters()} == flags
    assert hooks(model) == []
    drawn = OLDER_TRANSFORMERS and name == "wav2vec2"  # for layers to drop, in eval mode too
    assert torch.equal(torch.get_rng_state(), random) is not drawn
    assert tiny.relative_difference(outputs, tiny.outputs(model, tiny.inputs(model))) == 0.0


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str) -> None:
    """One map for each expert, those without a token on this batch too; the experts' implementation is restored."""
    model = experts_model(name)
    implementation, before = model.get_experts_implementation(), tiny.snapshot(model)
    assert implementation == {"": "grouped_mm"}
    with eager_experts(model):
        assert model.get_experts_implementation() == {"": "eager"}
        result = found(model, {"input_ids": torch.tensor([[5]])})  # goes to two experts of five
    with pytest.raises(KeyError), eager_experts(model):
        raise KeyError
    assert model.get_experts_implementation() == implementation
    assert tiny.snapshot(model) == before
    assert result.obstacles == {}
    experts = {site: maps for site, maps in result.maps.items() if ".experts." in site}
    assert list(experts) == both("model.layers.{}.mlp.experts.act_fn")
    for layer, maps in zip(model.model.layers, experts.values(), strict=True):
        stacked = layer.mlp.experts.down_proj
        assert [m.index for m in maps] == list(range(5))
        for m in maps:
            assert m.parameter is stacked
            assert m.bias is None
            assert m.shape == (stacked.shape[2], stacked.shape[1])
            assert m.label == f"{m.name}[{m.index}]"
            assert m.key == (stacked.data_ptr() + 4 * m.index * math.prod(m.shape), tuple(stacked.shape[1:]))
    rest = {site: [m.label for m in maps] for site, maps in result.maps.items() if site not in experts}
    shared = "model.layers.{}.mlp.shared_expert"
    wanted = {f"{path}.act_fn": [f"{path}.down_proj.weight"] for path in both(shared)} if name == "qwen2_moe" else {}
    assert rest == wanted


def test_eager_experts_without_experts() -> None:
    """A model without experts, and one that is eager already, are left alone."""
    for model in (converted("bert"), experts_model("mixtral")):
        model.set_experts_implementation("eager")
        before = model.get_experts_implementation()
        with eager_experts(model):
            assert model.get_experts_implementation() == before
        assert model.get_experts_implementation() == before


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("linear", "second.weight"),
        ("1 × 1", "second.weight"),
        ("in place", "second.weight"),
        ("through a slice", "second.weight"),
        ("the same twice", "second.weight"),
        ("copied", "weight"),
        ("3 × 3", "second.weight"),
        ("stride", "second.weight"),
        ("two", "it feeds several linear maps: second.weight, third.weight"),
        ("transposed", "weight"),
        ("computed", "it feeds a weight that is no parameter of the model as it stands"),
        ("computed bias", "it feeds a weight that is no parameter of the model as it stands"),
        ("none", "no linear map takes up its output"),
    ],
)
def test_kinds(kind: str, wanted: str) -> None:
    """What can be refit and what cannot, on models made by hand; the outputs are those of a run without watching."""
    model = handmade(kind)
    before, batch = tiny.snapshot(model), embeds()
    plain = model(**batch)["logits"]
    seen: list[Tensor] = []
    result = trace(model, lambda: seen.append(model(**batch)["logits"]))
    assert torch.equal(seen[0], plain)
    if wanted.endswith("weight") and "several" not in wanted:
        assert result.obstacles == {}
        (m,) = result.maps["act"]
        owner = model.second if wanted == "second.weight" else model
        assert (m.label, m.shape) == (wanted, (owner.weight[0].numel() if kind == "3 × 3" else 8, owner.weight.shape[0]))
        assert m.parameter is owner.weight
        assert m.bias is getattr(owner, "bias", None)
        assert m.transposed == (kind in ("transposed", "copied"))
    else:
        assert (result.maps, result.obstacles) == ({}, {"act": wanted})
    assert tiny.snapshot(model) == before
    assert hooks(model) == []


def test_groups() -> None:
    """A convolution in groups is a map for each of them."""
    model = handmade("groups")
    result = trace(model, lambda: model(**embeds()))
    weight, bias = model.second.weight, model.second.bias
    count, outputs = model.second.groups, len(weight) // model.second.groups
    assert count > 1
    assert [(m.label, m.shape, m.key) for m in result.maps["act"]] == [
        (f"second.weight[{g}]", (weight[0].numel(), outputs), (weight.data_ptr(), tuple(weight.shape))) for g in range(count)
    ]
    before = weight.detach().clone(), bias.detach().clone()
    last = result.maps["act"][-1]
    last.add(torch.ones(last.shape), torch.ones(outputs))
    assert torch.equal(weight[:-outputs], before[0][:-outputs])
    assert torch.equal(bias[:-outputs], before[1][:-outputs])
    torch.testing.assert_close(weight[-outputs:], before[0][-outputs:] + 1.0)
    torch.testing.assert_close(bias[-outputs:], before[1][-outputs:] + 1.0)


def test_two_sites_and_one_map() -> None:
    """A map that takes up two sites cannot be refit for both; a site that is never reached has its own reason."""
    assert found(handmade("shared"), embeds()).obstacles == {
        "act": "second.weight takes up act2 too",
        "act2": "second.weight takes up act too",
    }
    idle = found(handmade("idle"), embeds())
    assert idle.obstacles == {"act2": "the calibration batches never reach it"}
    assert (list(idle.maps), idle.order) == (["act"], ["act"])


@pytest.mark.parametrize("kind", ["linear", "1 × 1", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add(kind: str, dtype: torch.dtype) -> None:
    """ΔW (d, k) and c (k,) are added to the map's weight, whatever its layout, and bias, rounded once; of experts to one."""
    torch.manual_seed(0)
    if kind == "mixtral":
        model = experts_model("mixtral").to(dtype)
        with eager_experts(model):
            m = found(model).maps["model.layers.1.mlp.experts.act_fn"][3]
    elif kind == "gpt2":
        model = converted("gpt2", dtype=dtype)
        m = found(model).maps["transformer.h.1.mlp.act"][0]
    else:
        model = handmade(kind).to(dtype)
        m = found(model, {k: v.to(dtype) for k, v in embeds().items()}).maps["act"][0]
    old, bias = m.parameter.detach().clone(), None if m.bias is None else m.bias.detach().clone()
    change, shift = torch.randn(m.shape, dtype=torch.float64), torch.randn(m.shape[1], dtype=torch.float64)
    m.add(change, shift)
    place, was = (m.parameter[3], old[3]) if kind == "mixtral" else (m.parameter, old)
    flat = change if kind == "gpt2" else change.T
    assert torch.equal(place, (was.double() + flat.reshape(was.shape)).to(dtype))
    if kind == "mixtral":
        kept = [0, 1, 2, 4]
        assert torch.equal(m.parameter[kept], old[kept])
    else:
        assert bias is not None
        assert torch.equal(m.bias, (bias.double() + shift).to(dtype))
        m.add(None, shift)
        assert torch.equal(place, (was.double() + flat.reshape(was.shape)).to(dtype))
