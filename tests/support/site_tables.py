"""Where the sites, maps and blocks of the tiny models are, read off transformers' modelling code by hand."""

from __future__ import annotations

from typing import Any, NamedTuple


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
    """A layer as BERT has it, with the norm after the sum."""
    block = root + ".{}"
    return Where(block + ".intermediate.intermediate_act_fn", block + ".output.dense", block, ("output.LayerNorm",))


def mlp(block: str, act: str = "activation_fn", second: str = "fc2", **more: Any) -> Where:
    """A block with an `mlp` of two maps."""
    return Where(f"{block}.mlp.{act}", f"{block}.mlp.{second}", block, **more)


_LLAMA = mlp("model.layers.{}", "act_fn", "down_proj")
_TOWERS = [mlp("vision_model.encoder.layers.{}"), mlp("text_model.encoder.layers.{}")]
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
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
    "albert": [Where(f"{ALBERT}.activation", f"{ALBERT}.ffn_output", ALBERT)],
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
            "wav2vec2.feature_extractor.conv_layers.0.activation",
            "wav2vec2.feature_extractor.conv_layers.1.conv",
            "",
            ("wav2vec2.feature_extractor.conv_layers.1.activation",),
            moved=True,
        ),
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


def both(template: str) -> list[str]:
    """The names that a template stands for."""
    return [template.format(n) for n in range(2)] if "{}" in template else [template]
