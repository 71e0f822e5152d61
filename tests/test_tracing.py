"""Linear maps, chains of blocks and meeting points against tables that were read off the modelling code by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
)
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.linear_maps import Trace, eager_experts, trace
from hf_lambda_gelu.surgery.refit.blocks import with_hidden, without_hidden
from hf_lambda_gelu.surgery.refit.chains import Chain, capture, find_chains
from hf_lambda_gelu.surgery.refit.meeting_point import find_meeting
from hf_lambda_gelu.surgery.refit.store import Store


class Where(NamedTuple):
    """A site, the module that holds the map which takes it up, and their block; {} stands for both layers, a chain.

    `meeting`: the module of the block whose input the map's output has become part of, "output" for the block's own output,
    one for each layer if they differ, empty if there is none. `scale`: the parameter of the block that scales it.
    """

    site: str
    taker: str
    block: str
    meeting: tuple[str, ...] = ("output",)
    scale: str = ""
    moved: bool = False


def post_norm(root: str) -> Where:
    block = root + ".{}"
    return Where(block + ".intermediate.intermediate_act_fn", block + ".output.dense", block, ("output.LayerNorm",))


def mlp(block: str, act: str = "activation_fn", second: str = "fc2", **more: Any) -> Where:
    return Where(f"{block}.mlp.{act}", f"{block}.mlp.{second}", block, **more)


_LLAMA = mlp("model.layers.{}", "act_fn", "down_proj")
_TOWERS = [mlp("vision_model.encoder.layers.{}"), mlp("text_model.encoder.layers.{}")]
_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
_SWIN, _CONVNEXT = "swin.encoder.layers.{}", "convnext.encoder.stages.{}"
_ENCODER, _DECODER = "model.encoder.layers.{}", "model.decoder.layers.{}"
_T5 = [
    Where(f"{block}.layer.{n}.DenseReluDense.act", f"{block}.layer.{n}.DenseReluDense.wo", block)
    for block, n in (("encoder.block.{}", 1), ("decoder.block.{}", 2))
]

# in the order in which the forward reaches them
WHERE: dict[str, list[Where]] = {
    "bert": [post_norm("bert.encoder.layer")],
    "bert-classifier": [post_norm("bert.encoder.layer")],
    "roberta": [post_norm("roberta.encoder.layer")],
    "distilbert": [
        Where(
            "distilbert.transformer.layer.{}.ffn.activation",
            "distilbert.transformer.layer.{}.ffn.lin2",
            "distilbert.transformer.layer.{}",
            ("output_layer_norm",),
        )
    ],
    "albert": [Where(f"{_ALBERT}.activation", f"{_ALBERT}.ffn_output", _ALBERT)],
    "electra": [
        post_norm("electra.encoder.layer"),
        Where("discriminator_predictions.activation", "discriminator_predictions.dense_prediction", "", ()),
    ],
    "mpnet": [post_norm("mpnet.encoder.layer")],
    "deberta-v2": [post_norm("deberta.encoder.layer")],
    "modernbert": [mlp("model.layers.{}", "act", "Wo")],
    "vit": [mlp("vit.layers.{}")],
    "deit": [mlp("deit.layers.{}")],
    "beit": [mlp("beit.layers.{}", scale="lambda_2")],
    "dinov2": [mlp("dinov2.encoder.layer.{}", scale="layer_scale2.lambda1")],
    "swin": [
        Where(
            _SWIN + ".blocks.0.mlp.activation_fn", _SWIN + ".blocks.0.mlp.fc2", _SWIN, meeting=("downsample", "output")
        ),  # stages
    ],
    "convnext": [
        Where(
            _CONVNEXT + ".layers.0.act",
            _CONVNEXT + ".layers.0.pwconv2",
            _CONVNEXT,
            scale="layers.0.layer_scale_parameter",
            moved=True,
        )
    ],
    "clip": _TOWERS,
    "siglip": [_TOWERS[0], mlp("vision_model.head")._replace(block="", meeting=()), _TOWERS[1]],
    "gpt2": [mlp("transformer.h.{}", "act", "c_proj")],
    "whisper": [Where(f"{block}.activation_fn", f"{block}.fc2", block) for block in (_ENCODER, _DECODER)],
    "wav2vec2": [
        Where(
            "wav2vec2.feature_extractor.conv_layers.1.activation",
            "wav2vec2.feature_projection.projection",
            "",
            ("wav2vec2.encoder.pos_conv_embed.conv",),
            moved=True,
        ),
        Where(
            "wav2vec2.encoder.layers.{}.feed_forward.intermediate_act_fn",
            "wav2vec2.encoder.layers.{}.feed_forward.output_dense",
            "wav2vec2.encoder.layers.{}",
            ("final_layer_norm",),
        ),
    ],
    "t5": _T5,
    "t5-gelu": _T5,
    "gemma": [_LLAMA],
    "gemma2": [_LLAMA._replace(meeting=("post_feedforward_layernorm",))],  # before the sum
    "llama": [_LLAMA],
}

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
_MIXTRAL = {**tiny._GATED, "intermediate_size": 40, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_MIXTRAL, "num_local_experts": 5},
    "olmoe": {**_MIXTRAL, "num_experts": 5},
    "qwen2_moe": {
        **_MIXTRAL,
        "num_experts": 5,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
}


def converted(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny.build(name)
    hlg.convert(model)
    return model.to(dtype)


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """With weights large enough for the activations to matter, converted, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.0 if parameter.dim() > 1 else parameter))
    hlg.convert(model)
    return model.eval()


def experts_model(name: str) -> PreTrainedModel:
    return randomized(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXPERTS[name])))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(template: str) -> list[str]:
    return [template.format(n) for n in range(2)] if "{}" in template else [template]


def found(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> Trace:
    batch = tiny.inputs(model) if batch is None else batch
    return trace(model, lambda: model(**batch))


def hooks(model: nn.Module) -> list[str]:
    """The modules that have any hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


# --------------------------------------------------------------------------------------------------- models made by hand

Made = dict[str, Any]
Forward = Callable[["Handmade", Tensor], Tensor]


def _channels_first(model: Handmade, h: Tensor) -> Tensor:
    return model.second(h.movedim(-1, 1)).movedim(1, -1)


def _in_place(model: Handmade, h: Tensor) -> Tensor:
    h.mul_(2.0)
    return model.second(h.relu_()).add_(1.0)


# kind → how the second map is made, and how it is applied to the activation's output
KINDS: dict[str, tuple[Callable[[], Made], Forward]] = {
    "linear": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: m.second(h)),
    "1 × 1": (lambda: {"second": nn.Conv2d(8, 8, 1)}, _channels_first),
    "3 × 3": (lambda: {"second": nn.Conv2d(8, 8, 3, padding=1)}, _channels_first),
    "groups": (lambda: {"second": nn.Conv2d(8, 8, 1, groups=2)}, _channels_first),
    "stride": (lambda: {"second": nn.Conv2d(8, 8, 1, stride=2)}, _channels_first),
    "two": (lambda: {"second": nn.Linear(8, 8), "third": nn.Linear(8, 8)}, lambda m, h: m.second(h) + m.third(h)),
    "the same twice": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: m.second(h) + m.second(2 * h)),
    "transposed": (lambda: {"weight": nn.Parameter(torch.randn(8, 8))}, lambda m, h: F.linear(h, m.weight.T)),
    "computed": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: F.linear(h, m.second.weight.softmax(0))),
    "computed bias": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: F.linear(h, m.second.weight, 2 * m.second.bias)),
    "none": (lambda: {}, lambda m, h: h.square()),
    "in place": (lambda: {"second": nn.Linear(8, 8)}, _in_place),
    "through a slice": (lambda: {"second": nn.Linear(8, 4)}, lambda m, h: m.second(torch.cat([h[:, 1:], h[:, :1]], 1))),
    "shared": (
        lambda: {"second": nn.Linear(8, 8), "other": nn.Linear(8, 8), "act2": True},
        lambda m, h: m.second(h) + m.second(m.act2(m.other(h.detach()))),
    ),
    "idle": (lambda: {"second": nn.Linear(8, 8), "act2": True}, lambda m, h: m.second(h)),
    "copied": (  # it passes a map that is no F.linear, then one that is
        lambda: {"weight": nn.Parameter(torch.randn(8, 8)), "second": nn.Linear(8, 8)},
        lambda m, h: m.second(torch.tanh(h @ m.weight)),
    ),
}


class HandmadeConfig(PreTrainedConfig):
    model_type = "handmade"

    def __init__(self, kind: str = "linear", hidden_act: str = "gelu", **kwargs: Any) -> None:
        self.kind, self.hidden_act = kind, hidden_act
        super().__init__(**kwargs)


class Handmade(PreTrainedModel):
    """A linear map, an activation, and a second map as the kind says."""

    config_class = HandmadeConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config: HandmadeConfig) -> None:
        super().__init__(config)
        self.first, self.act = nn.Linear(8, 8), ACT2FN[config.hidden_act]
        for name, part in KINDS[config.kind][0]().items():
            setattr(self, name, ACT2FN[config.hidden_act] if part is True else part)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"logits": KINDS[self.config.kind][1](self, self.act(self.first(inputs_embeds)))}


class Block(nn.Module):
    """A residual block: "pre" and "post" norm, "wiped" is "post" and overwrites the sum once the norm has it, "gated" by a
    factor that differs from row to row, "plain" without a site.
    """

    def __init__(self, kind: str, act: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.Tanh() if kind == "plain" else ACT2FN[act]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.second(self.act(self.first(x if self.kind in ("post", "wiped") else self.norm(x))))
        if other is not None:
            y = y + other
        if self.kind in ("post", "wiped"):
            total = x + y
            x = self.norm(total)
            if self.kind == "wiped":
                total.zero_()
            return x
        return x + y * torch.sigmoid(x.sum(-1, keepdim=True)) if self.kind == "gated" else x + y


class StackConfig(PreTrainedConfig):
    model_type = "handmade_stack"

    def __init__(self, front: Any = (), back: Any = (), way: str = "", hidden_act: str = "gelu", **kwargs: Any) -> None:
        self.front, self.back, self.way, self.hidden_act = list(front), list(back), way, hidden_act
        super().__init__(**kwargs)


class Stack(PreTrainedModel):
    """Two stacks of blocks. The last of the back runs only where the input is small, so that it may skip a batch.

    Ways of the front: "dependent" gives each block a second argument made from the hidden state, "flipped" turns the hidden
    state round after each block, "reversed" begins with the last.
    """

    config_class = StackConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.front = nn.ModuleList(Block(kind, config.hidden_act) for kind in config.front)
        self.back = nn.ModuleList(Block(kind, config.hidden_act) for kind in config.back)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        x = inputs_embeds
        for block in reversed(self.front) if self.config.way == "reversed" else self.front:
            x = block(x, x.mean(-1, keepdim=True).square()) if self.config.way == "dependent" else block(x)
            x = x.flip(1) if self.config.way == "flipped" else x
        x = x.flip(1)
        for block in self.back:
            if block is not self.back[-1] or float(inputs_embeds.abs().max()) < 100.0:
                x = block(x)
        return {"logits": x}


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
        find_chains(model, forward, {})
    result = found(model)
    with pytest.raises(KeyError):
        find_chains(model, forward, result.maps)
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
        return find_chains(model, lambda: model(**batch), {s: result.maps[s] for s in result.order if s in result.maps})


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


@torch.no_grad()
def moved(
    stock: PreTrainedModel, block: str, module: str, taker: str, scale: Tensor, channels_first: bool
) -> tuple[Tensor, Tensor]:
    """The change of the stream of a stock model when the map's output moves by a vector, and scale ⊙ the vector."""
    seen: list[Tensor] = []

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    owner = stock.get_submodule(block)
    if module == "output":
        watch = owner.register_forward_hook(lambda _, args, output: seen.append(first(output).clone()))
    else:
        watch = owner.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    vector = torch.randn(len(scale), generator=torch.Generator().manual_seed(1))
    stock(**tiny.inputs(stock))
    push = stock.get_submodule(taker).register_forward_hook(lambda _, args, output: output + vector)
    stock(**tiny.inputs(stock))
    watch.remove()
    push.remove()
    change = seen[1] - seen[0]
    change = change.movedim(1, -1) if channels_first else change
    return change, (scale * vector).expand_as(change)


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
