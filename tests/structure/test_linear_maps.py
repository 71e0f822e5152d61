"""Linear maps, chains of blocks and meeting points against tables that were read off the modelling code by hand."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.networks import (
    _ALBERT,
    EXPERTS,
    WHERE,
    Handmade,
    HandmadeConfig,
    Stack,
    StackConfig,
    Where,
    both,
    experts_model,
    hooks,
    moved,
    randomized,
)
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.linear_maps import eager_experts
from hf_lambda_gelu.structure.tracing import Trace, trace
from hf_lambda_gelu.surgery.refit.blocks import Chain, capture, plan, with_hidden, without_hidden
from hf_lambda_gelu.surgery.refit.meeting_point import find_meeting
from hf_lambda_gelu.surgery.refit.store import Store

_TIED = "the weight that it feeds is shared with {}.weight"
OBSTACLES: dict[str, dict[str, str]] = {
    "bert": {"cls.predictions.transform.transform_act_fn": _TIED.format("cls.predictions.decoder")},
    "distilbert": {"activation": _TIED.format("vocab_projector")},
    "albert": {"predictions.activation": _TIED.format("predictions.decoder")},
    "modernbert": {"head.act": _TIED.format("decoder")},
    "wav2vec2": {
        "wav2vec2.feature_extractor.conv_layers.0.activation": "it feeds a convolution with kernel 3",
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


def converted(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny.build(name)
    hlg.convert(model)
    return model.to(dtype)


def found(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> Trace:
    batch = tiny.inputs(model) if batch is None else batch
    return trace(model, lambda: model(**batch))


def handmade(kind: str) -> PreTrainedModel:
    return randomized(Handmade(HandmadeConfig(kind)))


def stack(*front: str, back: tuple[str, ...] = (), way: str = "") -> PreTrainedModel:
    return randomized(Stack(StackConfig(front, back, way)))


def embeds(seed: int = 0, shape: tuple[int, ...] = (2, 4, 4, 8)) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


# ------------------------------------------------------------------------------------------------------------- maps


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
        assert m.shape == (tuple(m.parameter.shape) if m.transposed else tuple(reversed(m.parameter.shape)))
        assert m.index is None
    assert tiny.snapshot(model) == before
    assert {n: (p.requires_grad, p.grad, id(p)) for n, p in model.named_parameters()} == flags
    assert hooks(model) == []
    assert torch.equal(torch.get_rng_state(), random)
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
        ("copied", "second.weight"),
        ("3 × 3", "it feeds a convolution with kernel 3×3"),
        ("groups", "it feeds a convolution with kernel 1×1"),
        ("stride", "it feeds a convolution with kernel 1×1"),
        ("two", "it feeds several linear maps: second.weight, third.weight"),
        ("transposed", "it feeds a weight that is no parameter of the model as it stands"),
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
    if wanted.endswith(".weight") and "several" not in wanted:
        assert result.obstacles == {}
        (m,) = result.maps["act"]
        assert (m.label, m.shape) == (wanted, (8, model.second.weight.shape[0]))
        assert (m.parameter, m.bias) == (model.second.weight, model.second.bias)
    else:
        assert (result.maps, result.obstacles) == ({}, {"act": wanted})
    assert tiny.snapshot(model) == before
    assert hooks(model) == []


def test_two_sites_and_one_map() -> None:
    """A map that takes up two sites cannot be refit for both; a site that is never reached has its own reason."""
    assert found(handmade("shared"), embeds()).obstacles == {
        "act": "second.weight takes up act2 too",
        "act2": "second.weight takes up act too",
    }
    idle = found(handmade("idle"), embeds())
    assert idle.obstacles == {"act2": "the calibration batches never reach it"}
    assert (list(idle.maps), idle.order) == (["act"], ["act"])


def test_forward_that_raises() -> None:
    """No hook stays, and no watcher either, when the forward raises in the middle."""
    model = converted("bert")

    def forward() -> None:
        model(**tiny.inputs(model))
        raise KeyError

    with pytest.raises(KeyError):
        trace(model, forward)
    with pytest.raises(KeyError):
        plan(model, forward, {})
    result = found(model)
    with pytest.raises(KeyError):
        plan(model, forward, result.maps)
    block = Chain(["bert.pooler", "bert.encoder.layer.1"], [[], []])
    with pytest.raises(KeyError):
        capture(model, block, forward)  # there is no pooler
    assert hooks(model) == []
    outputs = model(**tiny.inputs(model)).logits
    assert outputs.grad_fn is not None
    assert not any(p.grad is not None for p in model.parameters())


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
        model = converted("gpt2", dtype)
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


# ----------------------------------------------------------------------------------------------------------- chains


def planned(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> list[Chain]:
    result = found(model, batch)
    batch = tiny.inputs(model) if batch is None else batch
    with torch.no_grad():
        return plan(model, lambda: model(**batch), {s: result.maps[s] for s in result.order if s in result.maps})


@pytest.mark.parametrize("name", tiny.MODELS)
def test_chains(name: str) -> None:
    """All layers of a stack are in one chain, encoder and decoder in two, towers in two; ALBERT's one layer is pooled."""
    model = converted(name)
    before = tiny.snapshot(model)
    assert planned(model) == [
        Chain(both(where.block), [[site] for site in both(where.site)], pooled=name == "albert") for where in WHERE[name]
    ]
    assert tiny.snapshot(model) == before
    assert hooks(model) == []


def test_chains_of_more() -> None:
    """Eleven layers are one chain; of a stage with two blocks both sites are in one step."""
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**{**tiny._TEXT, "num_hidden_layers": 11}))
    hlg.convert(bert)
    (chain,) = planned(bert.eval(), {"input_ids": torch.tensor([[5, 6]])})
    assert chain.blocks == [f"encoder.layer.{n}" for n in range(11)]
    assert [len(sites) for sites in chain.sites] == [1] * 11
    swin = SwinModel(SwinConfig(**{**tiny._STAGES, "depths": [2, 3]}))
    hlg.convert(swin)
    (chain,) = planned(swin.eval())
    assert chain.blocks == both("encoder.layers.{}")
    assert chain.sites == [
        [f"encoder.layers.{stage}.blocks.{n}.mlp.activation_fn" for n in range(depth)] for stage, depth in enumerate((2, 3))
    ]
    assert [(c.blocks, c.sites) for c in chain.split()] == [
        ([block], [sites]) for block, sites in zip(chain.blocks, chain.sites, strict=True)
    ]


def test_chains_of_stacks() -> None:
    """Blocks without sites are left out at a chain's ends and kept within; what is not handed on as it is ends a chain."""
    model = stack("plain", "pre", "plain", "post", "plain", back=("pre", "gated"))
    front, back = planned(model, embeds())
    assert front == Chain(["front.1", "front.2", "front.3"], [["front.1.act"], [], ["front.3.act"]])
    assert back == Chain(["back.0", "back.1"], [["back.0.act"], ["back.1.act"]])
    flipped = planned(stack("pre", "pre", way="flipped"), embeds())
    assert flipped == [Chain(["front.0"], [["front.0.act"]]), Chain(["front.1"], [["front.1.act"]])]
    (turned,) = planned(stack("pre", "plain", "post", way="reversed"), embeds())
    assert turned == Chain(["front.2", "front.1", "front.0"], [["front.2.act"], [], ["front.0.act"]])
    assert front.split() == [Chain(["front.1"], [["front.1.act"]]), Chain(["front.3"], [["front.3.act"]])]


def test_capture() -> None:
    """The arguments of each block, and that the pass ends at the last block: what comes after it does not run."""
    model, batch = converted("bert"), tiny.inputs(converted("bert"))
    with torch.no_grad():
        hidden = tiny.build("bert")(**batch, output_hidden_states=True).hidden_states
    ran: list[str] = []
    watched = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("bert.encoder.layer.0", "bert.encoder.layer.1", "cls")
    ]
    with torch.no_grad():
        calls = capture(model, Chain(both("bert.encoder.layer.{}"), [[], []]), lambda: model(**batch))
    assert ran == ["bert.encoder.layer.0"]
    for handle in watched:
        handle.remove()
    for call, wanted in zip(calls, hidden, strict=False):
        rest, taken = without_hidden(call)
        torch.testing.assert_close(taken, wanted, rtol=1e-5, atol=1e-5)
        args, kwargs = with_hidden(rest, taken + 1)
        assert torch.equal(args[0], taken + 1)
        assert {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}.keys() == {
            k for k, v in call[1].items() if isinstance(v, Tensor)
        }
    albert = converted("albert")
    with torch.no_grad():
        pooled = capture(albert, Chain([_ALBERT], [[]], pooled=True), lambda: albert(**batch))
    assert len(pooled) == 3
    assert hooks(model) == hooks(albert) == []


def test_hidden_as_keyword() -> None:
    """The hidden state is the first floating point tensor, by position or by name; without one it is said."""
    x, mask = torch.ones(2, 3), torch.ones(2, dtype=torch.long)
    rest, hidden = without_hidden(((mask, None), {"flag": True, "x": x, "y": x}))
    assert hidden is x
    args, kwargs = with_hidden(rest, x * 2)
    assert args == (mask, None)
    assert torch.equal(kwargs["x"], x * 2)
    assert kwargs["y"] is x
    assert kwargs["flag"] is True
    with pytest.raises(ValueError, match="no hidden state"):
        without_hidden(((mask,), {}))


def test_store(tmp_path: Path) -> None:
    """Nested values come back as they were, also bf16, views and shared tensors, which are written once."""
    store = Store(tmp_path, torch.device("cpu"))
    big, strange = torch.randn(64, 64), torch.randn(6, 4).bfloat16().T
    value = {
        "x": [(big, big), strange],
        "n": None,
        "s": "text",
        "rows": big[1::2],
        "head": big[:3],
        "turned": big.T,
        "i": torch.tensor([1, 2]),
        "f": 2.5,
    }
    store.put("a", value)
    assert (tmp_path / "a.safetensors").stat().st_size < 2.7 * big.numel() * 4
    assert not any(isinstance(leaf, Tensor) for kept, _ in store._specs.values() for leaf in kept)
    got = store.get("a")
    assert torch.equal(got["x"][0][0], big)
    assert torch.equal(got["x"][0][1], big)
    assert got["x"][1].dtype == torch.bfloat16
    assert torch.equal(got["x"][1], strange)
    assert torch.equal(got["rows"], big[1::2])
    assert torch.equal(got["head"], big[:3])
    assert torch.equal(got["turned"], big.T)
    assert (got["n"], got["s"], got["f"], got["i"].tolist()) == (None, "text", 2.5, [1, 2])
    store.put("b", big)
    store.rename("b", "a")
    assert "b" not in store
    assert torch.equal(store.get("a"), big)
    store.discard("a")
    store.discard("a")
    assert "a" not in store


# --------------------------------------------------------------------------------------------------- meeting points


@torch.no_grad()
def meeting_of(model: PreTrainedModel, block: str, site: str, batch: dict[str, Tensor]) -> Any:
    (linear,) = found(model, batch).maps[site]
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch = {**batch, "use_cache": False}  # a cache would grow from run to run
    arguments = capture(model, Chain([block], [[site]]), lambda: model(**batch))[0]
    return find_meeting(model.get_submodule(block), arguments, linear)


CASES = [
    pytest.param(name, where, id=f"{name}-{where.site}")
    for name, wheres in WHERE.items()
    for where in wheres
    if where.block != _ALBERT  # it runs three times
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "where"), CASES)
def test_meeting(name: str, where: Where, dtype: torch.dtype) -> None:
    """Module and layer scale against the table, and against a stock model in which a hook moves the map's output."""
    model, stock = converted(name, dtype), tiny.build(name)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs(model).items()}
    for n, (site, taker, block) in enumerate(zip(both(where.site), both(where.taker), both(where.block), strict=True)):
        meeting = meeting_of(model, block, site, batch)
        assert hooks(model) == []
        if not where.meeting:
            assert meeting is None
            continue
        assert meeting is not None
        module = where.meeting[n % len(where.meeting)]
        assert meeting.module == (None if module == "output" else module)
        assert meeting.moved == where.moved
        width = stock.get_submodule(taker).weight.shape[1 if name == "gpt2" else 0]
        scale = stock.get_submodule(block).get_parameter(where.scale) if where.scale else torch.ones(width)
        torch.testing.assert_close(
            meeting.scale.float(), scale.detach(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.02
        )
        if dtype == torch.float32:
            torch.testing.assert_close(*moved(stock, block, module, taker, scale, where.moved), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 768])
def test_meeting_of_one_row(width: int, dtype: torch.dtype) -> None:
    """One token of one example: for a single row all that a norm does is a scale, which is not taken for one."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**tiny._TEXT, "hidden_size": width, "num_hidden_layers": 1}))
    hlg.convert(model)
    site = "encoder.layer.0.intermediate.intermediate_act_fn"
    meeting = meeting_of(model.eval().to(dtype), "encoder.layer.0", site, {"input_ids": torch.tensor([[5]])})
    assert meeting.module == "output.LayerNorm"
    torch.testing.assert_close(meeting.scale.float(), torch.ones(width), rtol=0, atol=0.02)


@pytest.mark.parametrize(("kind", "wanted"), [("pre", "output"), ("post", "norm"), ("wiped", "norm"), ("gated", "")])
def test_meeting_of_blocks(kind: str, wanted: str) -> None:
    """Block output for the norm first, the norm's input for the norm last, nothing where each row is scaled differently."""
    model = stack(kind, "pre")
    meeting = meeting_of(model, "front.0", "front.0.act", embeds())
    assert ("" if meeting is None else meeting.module or "output") == wanted
