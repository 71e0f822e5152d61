"""Tiny random models of many architectures, and inputs for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    DeiTForImageClassification,
    PreTrainedModel,
)

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
GATED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}

# name → (model type, auto class, config values)
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert": ("bert", AutoModelForMaskedLM, TEXT),
    "bert-classifier": ("bert", AutoModelForSequenceClassification, TEXT),
    "roberta": ("roberta", AutoModelForMaskedLM, TEXT),
    "distilbert": (
        "distilbert",
        AutoModelForMaskedLM,
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 64},
    ),
    "albert": ("albert", AutoModelForMaskedLM, {**TEXT, "embedding_size": 16, "num_hidden_layers": 3}),
    "electra": ("electra", AutoModelForPreTraining, {**TEXT, "embedding_size": 16}),
    "mpnet": ("mpnet", AutoModelForMaskedLM, TEXT),
    "deberta-v2": (
        "deberta-v2",
        AutoModelForSequenceClassification,
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "modernbert": (
        "modernbert",
        AutoModelForMaskedLM,
        {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "vit": ("vit", AutoModelForImageClassification, VISION),
    "deit": ("deit", DeiTForImageClassification, VISION),
    "beit": ("beit", AutoModelForImageClassification, VISION),
    "dinov2": ("dinov2", AutoModelForImageClassification, {**VISION, "mlp_ratio": 2}),
    "swin": ("swin", AutoModelForImageClassification, STAGES),
    "convnext": (
        "convnext",
        AutoModelForImageClassification,
        {"image_size": 32, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]},
    ),
    "clip": (
        "clip",
        AutoModel,
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
    ),
    "siglip": ("siglip", AutoModel, {"text_config": TEXT, "vision_config": VISION}),
    "gpt2": (
        "gpt2",
        AutoModelForCausalLM,
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "whisper": (
        "whisper",
        AutoModelForSpeechSeq2Seq,
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "wav2vec2": (
        "wav2vec2",
        AutoModelForCTC,
        {
            **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"},
            "conv_dim": [16, 16],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "t5": ("t5", AutoModelForSeq2SeqLM, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "t5-gelu": ("t5", AutoModelForSeq2SeqLM, {**_T5, "feed_forward_proj": "gelu"}),
    "gemma": ("gemma", AutoModelForCausalLM, GATED),
    "gemma2": ("gemma2", AutoModelForCausalLM, GATED),
    "llama": ("llama", AutoModelForCausalLM, GATED),
}


class Activation(NamedTuple):
    """What a config attribute says, the λ-GELU base that belongs to it, and how many modules are built from it."""

    value: str
    base: str
    sites: int


_ERF = {"hidden_act": Activation("gelu", "gelu", 2)}
_ERF_AND_HEAD = {"hidden_act": Activation("gelu", "gelu", 3)}
_TANH = Activation("gelu_pytorch_tanh", "gelu_tanh", 2)

# name → config path → activation: read off the modelling code by hand
ACTIVATIONS: dict[str, dict[str, Activation]] = {
    "bert": _ERF_AND_HEAD,
    "bert-classifier": _ERF,
    "roberta": _ERF,
    "distilbert": {"activation": Activation("gelu", "gelu", 3)},
    "albert": {"hidden_act": Activation("gelu_new", "gelu_tanh", 2)},
    "electra": _ERF_AND_HEAD,
    "mpnet": _ERF,
    "deberta-v2": _ERF,
    "modernbert": {
        "hidden_activation": Activation("gelu", "gelu", 2),
        "classifier_activation": Activation("gelu", "gelu", 1),
    },
    "vit": _ERF,
    "deit": _ERF,
    "beit": _ERF,
    "dinov2": _ERF,
    "swin": _ERF,
    "convnext": _ERF,
    "clip": {
        "text_config.hidden_act": Activation("quick_gelu", "quick_gelu", 2),
        "vision_config.hidden_act": Activation("quick_gelu", "quick_gelu", 2),
    },
    "siglip": {"text_config.hidden_act": _TANH, "vision_config.hidden_act": _TANH._replace(sites=3)},
    "gpt2": {"activation_function": Activation("gelu_new", "gelu_tanh", 2)},
    "whisper": {"activation_function": Activation("gelu", "gelu", 4)},
    "wav2vec2": {"hidden_act": Activation("gelu", "gelu", 2), "feat_extract_activation": Activation("gelu", "gelu", 3)},
    "t5": {"dense_act_fn": Activation("gelu_new", "gelu_tanh", 4)},
    "t5-gelu": {"dense_act_fn": Activation("gelu", "gelu", 4)},
    "gemma": {"hidden_act": _TANH},
    "gemma2": {"hidden_activation": _TANH},
    "llama": {"hidden_act": Activation("silu", "silu", 2)},
}

# name → (module, call) of the smooth activations that are no modules, likewise
LEFT: dict[str, list[tuple[str, str]]] = {
    "roberta": [("lm_head", "gelu(x)")],
    "mpnet": [("lm_head", "gelu(x)")],
    "deberta-v2": [("pooler", "ACT2FN[self.config.pooler_hidden_act]")],
    "whisper": [
        ("model.encoder", "nn.functional.gelu(self.conv1(input_features))"),
        ("model.encoder", "nn.functional.gelu(self.conv2(inputs_embeds))"),
    ],
}


def relu_overrides(name: str) -> dict[str, Any]:
    """Overrides for `build` with which stock transformers makes the same network with ReLU."""
    values = MODELS[name][2]
    if name.startswith("t5"):
        return {"feed_forward_proj": values["feed_forward_proj"].replace("gelu", "relu")}
    overrides: dict[str, Any] = {}
    for path in ACTIVATIONS[name]:
        owner, _, attribute = path.rpartition(".")
        overrides.update({owner: {**values[owner], attribute: "relu"}} if owner else {attribute: "relu"})
    return overrides


def build(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The tiny model in eval mode, with weights large enough for the activations to matter."""
    model_type, auto, values = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**values, **overrides})
    return enliven(auto.from_config(config) if hasattr(auto, "from_config") else auto(config)).eval()


@torch.no_grad()
def enliven(model: PreTrainedModel) -> PreTrainedModel:
    """Draw weights so large that the activations matter."""
    for parameter in model.parameters():
        # biases and layer scales too: a layer scale of 1e-6 would hide what the activation does
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.0 if parameter.dim() > 1 else parameter))
    return model


def inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Inputs that the model's forward takes, by its own main input names."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    names = {model.main_input_name}
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        names |= {"input_ids", "pixel_values"}
    made: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: torch.randint(3, 99, (2, 11), generator=generator),
        "pixel_values": lambda: torch.randn(2, 3, 32, 32, generator=generator),
        "input_features": lambda: torch.randn(2, 8, 32, generator=generator),
        "input_values": lambda: torch.randn(2, 400, generator=generator),
    }
    batch = {name: made[name]() for name in sorted(names)}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 99, (2, 7), generator=generator)
    return batch


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every floating point tensor of the output, flattened out of nested outputs."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect({k: v for k, v in model(**batch).items() if k != "past_key_values"})
    return found


def relative_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """max over tensors of max|a − b| / max|a|."""
    assert len(first) == len(second) > 0
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(first, second, strict=True))


def set_hardness(model: PreTrainedModel, value: float, step: float = 0.0) -> dict[str, float]:
    """Set λ of the sites to value, value + step …, by duck typing: stock processes use this file too; {name: λ}."""
    sites = {name: module for name, module in model.named_modules() if hasattr(module, "set_hardness")}
    for index, module in enumerate(sites.values()):
        module.set_hardness(value + index * step)
    return {name: value + index * step for index, name in enumerate(sites)}


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """What a failed operation must leave as it was: configs, module objects, train or eval mode, all weights to the bit."""

    def digest(tensor: Tensor) -> str:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return "meta" if raw.is_meta else hashlib.sha256(raw.numpy().tobytes()).hexdigest()

    modules = dict(model.named_modules(remove_duplicate=False))
    configs = {id(module.config): module.config for module in modules.values() if hasattr(module, "config")}
    return {
        "configs": [config.to_dict() for config in configs.values()],
        "modules": {name: (type(module).__name__, id(module), module.training) for name, module in modules.items()},
        "tensors": {name: (tensor.dtype, digest(tensor)) for name, tensor in model.state_dict().items()},
    }
