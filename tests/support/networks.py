"""Networks of a few layers whose structure is known by heart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from support import tiny


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


def both(template: str) -> list[str]:
    return [template.format(n) for n in range(2)] if "{}" in template else [template]


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
