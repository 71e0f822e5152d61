"""Tiny models whose feed-forward layers are of other kinds: gate and up in one map, 1×1 convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

import hf_lambda_gelu as hlg
from support import tiny

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# model type → its config: a gate before the up map, which get biases by a switch; after it, beside layers without gates;
# convolutions whose width is a ratio
OTHER_LAYERS: dict[str, dict[str, Any]] = {
    "modernbert": {**tiny.TEXT, **_TOKENS},
    "moonshine": {
        **_TOKENS,
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 1,
    },
    "poolformer": {
        "image_size": 16,
        "depths": [1, 2],
        "hidden_sizes": [12, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "padding": [1, 1],
        "num_encoder_blocks": 2,
        "mlp_ratio": 2.0,
    },
}


def smooth_layers(name: str, **config: Any) -> PreTrainedModel:
    """The model of that type in eval mode, with weights that let its gates matter."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(AutoConfig.for_model(name, **{**OTHER_LAYERS[name], **config}))
    return tiny.enliven(model).eval()


def other_layers(name: str, **config: Any) -> PreTrainedModel:
    """`smooth_layers`, converted."""
    model = smooth_layers(name, **config)
    hlg.convert(model)
    return model


def other_inputs(name: str, seed: int = 0, size: int = 2) -> dict[str, Tensor]:
    """What its forward takes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 99, (size, 11), generator=generator)
    if name == "poolformer":
        return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
    if name == "moonshine":
        return {"input_values": torch.randn(size, 4000, generator=generator), "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def other_rows(name: str, count: int = 24) -> list[dict[str, Tensor]]:
    """As many batches of that, to calibrate on."""
    return [other_inputs(name, seed) for seed in range(count)]
