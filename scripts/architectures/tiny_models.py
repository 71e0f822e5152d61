"""Tiny models of the architectures of transformers, with random weights: made from the default configurations, shrunk."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from scripts.architectures.tiny_inputs import example_inputs

__all__ = ["CannotBuild", "example_inputs", "model_class", "model_types", "tiny_config", "tiny_model"]

VOCABULARY = 256
KEPT_TOKENS = 100  # token ids below this are kept, the others get the ids from here on

# The first pattern that is found in the name of an integer attribute caps it; -1 leaves it as it is.
CAPS: list[tuple[str, int]] = [
    (r"insert_layer_id|num_kv_shared_layers", 0),
    (
        r"(?<!mm_)token|kernel|stride|ratio|factor|temperature|num_channels|loss|_cost|patch_|_ids?$|_period|seed$|interval"
        r"|input_feat|feature_projection_input|xpath|_base$",
        -1,
    ),
    (r"mel_bins|sampling_rate|sample_rate|chunk_length|step|expand|hop_length|num_labels|merge_size|feature_levels", -1),
    (r"vocab(_size)?$|vocab_size_per|num_embeddings|num_classes|vocab_size_base", VOCABULARY),
    (r"codebook_size|codevectors|num_clusters", 64),
    (r"mamba.*heads|^ssm.*heads", 8),
    (r"mamba_d_head", 16),
    (r"pos_feats|num_landmarks|segment_means", 32),
    (r"mm_tokens_per_image", 4),
    (r"^window_size$", 2),
    (r"_filters|(?<!upsample)_groups$", 8),
    (r"(heads?|head_num)$|heads_per|^n_head", 4),
    (r"rope_head_dim|rotary_dim", 8),
    (r"head_(dim|size)|^d_kv$|kv_channels|dim_head|^d_head|mamba_d_head|linear_.*head_dim", 16),
    (r"_rank$|lowrank", 16),
    (r"experts?_per_tok|top_?k|num_selected|^moe_k$", 2),
    (r"(num|n)_\w*shared_expert|n_group|topk_group|zero_expert", 2),
    (r"num_\w*experts|n_routed_experts|num_local", 4),
    (r"intermediate|ffn|feed_?forward|^d_ff$|d_inner|linear_units|mlp_(hidden_)?(dim|size)|expert_dim|ff_dim|inner_dim", 48),
    (r"adapter_layers|max_window_layers|nextn|max_depth", -1),
    (r"layers?$|depth$|^num_blocks$|_num_layers|layers_per", 2),
    (r"max_\w*position|n_positions|max_seq_len|^n_ctx$|max_\w*length|positions$|max_pos_emb|context_length$", 128),
    (r"sliding_window(_size)?$|attention_chunk_size|local_attention|attention_window|^block_size$|^chunk_size$", 8),
    (r"num_\w*quer(y|ies)|latents$|latent_query|detection_tokens|query_num", 8),
    (
        r"hidden|embed|(^|_)dims?$|d_model|n_embd|width|channels|project\w*_size|output_size|_units|feature_size"
        r"|upsample_groups|initial_channel|bottleneck_feat",
        64,
    ),
    (r"state_size|d_state", 16),
]

# Attributes that are None in a default configuration but have to be set.
WANTED = {"head_dim": 16, "image_token_id": 98, "image_token_index": 98, "audio_token_id": 97, "audio_token_index": 97}
WANTED |= {"video_token_id": 96, "video_token_index": 96}

# Small networks whose stages fit together in more ways than names tell: only their images are made smaller.
UNSCALED = {"align_vision_model", "efficientnet", "pp_lcnet", "pp_lcnet_v3", "pp_lcnet_v4"}
UNSCALED |= {"superpoint", "uvdoc", "uvdoc_backbone"}

# The names under which a configuration counts its layers; lists of that length hold a value for each.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "depth", "n_layers", "layers", "encoder_layers", "decoder_layers")
INDICES = re.compile(r"ind(ic|ex)es$|_idxs?$|layer_ids$|_layers$|hook_ids$")
# The names of lists that tell a network of stages, of which the widths are kept in proportion.
STAGES = ("depths", "num_heads", "blocks_per_stage", "stage_numb_of_layers")
TOKEN = re.compile(r"(token_(id|index|idx|ids)|(bos|eos|pad)_id)$")

# What the default configurations of some need to be valid, or to have all their parts.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": {"model_type": "gemma4_audio"}},
    "gemma4_unified": {"vision_config": {}, "audio_config": {}},
}

# What cannot be made, apart from what needs another package or has no forward, and why.
SESSION, INVALID = "its forward takes a session of a video", "its default configuration makes no model that runs"
UNBUILDABLE = dict.fromkeys(("edgetam_video", "sam2_video", "sam3_tracker_video", "sam3_video"), SESSION)
UNBUILDABLE |= dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant", "uvdoc"), INVALID)
UNBUILDABLE |= dict.fromkeys(("pp_ocrv5_server_det", "pp_ocrv6_medium_det", "pp_ocrv6_small_det"), INVALID)

# What the rules get wrong, by where it is.
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOWED = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
WINDOWED |= {"head_dim": 24, "qk_nope_head_dim": 16, "v_head_dim": 16}
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config.width_coefficient": 1.0,
        "vision_config.depth_coefficient": 1.0,
        "vision_config.hidden_dim": 1280,
        "projection_dim": 320,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": {"prediction_length": 8, "label_length": 4},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "blt": {"num_hidden_layers": 2},
    "chameleon": {
        "vocabulary_map": {"<image>": 98, **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 110 + i for i in range(64)}},
        "vq_config.num_embeddings": 64,
    },
    "clvp": {f"{part}_config.hidden_size": 128 for part in ("text", "speech", "decoder")},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "cvt": {"depth": [1, 2, 3]},
    "dac": {"encoder_hidden_size": 16, "decoder_hidden_size": 64, "hidden_size": 256},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_pro": {"patch_size": 56, "intermediate_hook_ids": [1, 0]},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"audio_config.adapter_input_size": 64, **{f"text_config.swa_{n}": v for n, v in WINDOWED.items()}},
    "dots3_note_text": {f"swa_{name}": value for name, value in WINDOWED.items()},
    "efficientloftr": {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "out_features": [64, 64, 128, 256],
    },
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "emu3": {
        "vocabulary_map": {"<image>": 98, "<|extra_200|>": 99, **{f"<|visual token {i:06d}|>": 110 + i for i in range(64)}},
        "vq_config.codebook_size": 64,
        "vq_config.hidden_size": 256,
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 64, "pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config.model_in_dim": 80},
    "florence2": {"vision_config.projection_dim": 64},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "glm5_next": {"text_config.index_topk": 16},
    "glm5_next_text": {"index_topk": 16},
    "glmasr": {"audio_config.intermediate_size": 256},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "granite_speech": {"encoder_config.context_size": 32, "window_size": 15},
    "granite_speech_plus": {"encoder_config.context_size": 32, "window_size": 15},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "grounding-dino": {"max_text_len": 12},
    "informer": {"prediction_length": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kyutai_speech_to_text": {"audio_pad_token_id": 8448, "audio_bos_token_id": 255},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4": {"vision_config.intermediate_size": 256},
    "longcat_flash": {"head_dim": 8},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2, 3]},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 3]},
    "mllama": {"vision_config.vision_output_dim": 192},
    "mm-grounding-dino": {"max_text_len": 12},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_glimmer_assistant": {"sliding_window": 64},
    "muse_spark": {"audio_config.out_hidden_size": 64, "out_hidden_size": 256},
    "nemotron": {"num_key_value_heads": 2},
    "neucodec": {"quantization_dim": 128, "encoder_hidden_size": 16},
    "omdet-turbo": {
        "apply_layernorm_after_vision_backbone": False,
        "encoder_in_channels": [64, 128, 256],
        "d_model": 32,
        "decoder_hidden_dim": 32,
        "vision_features_channels": [32, 32, 32],
    },
    "paddleocr_vl": {"text_config.rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "pp_doclayout_v2": {
        "class_thresholds": [0.5] * 25,
        "class_order": list(range(25)),
        "reading_order_config.max_2d_position_embeddings": 1024,
    },
    "pp_doclayout_v3": {"x4_feat_dim": 32},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 95, "vision_end_token_id": 94},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 95, "vision_end_token_id": 94},
    "qwen4_exp": {f"text_config.indexer_{name}": value for name, value in INDEXER.items()},
    "qwen4_exp_text": {f"indexer_{name}": value for name, value in INDEXER.items()},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sam2": {"vision_config.backbone_config.global_attention_blocks": [4]},
    "sam2_hiera_det_model": {"global_attention_blocks": [4]},
    "sam2_vision_model": {"backbone_config.global_attention_blocks": [4]},
    "seggpt": {"merge_index": 0, "image_size": [64, 32]},
    "shieldgemma2": {"yes_token_index": 90, "no_token_index": 91},
    "step3p7": {"text_config.sliding_window": 8},
    "superglue": {"hidden_size": 256, "gnn_layers_types": ["self", "cross"], "keypoint_encoder_sizes": [32, 64]},
    "swin2sr": {"embed_dim": 48},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "time_series_transformer": {"prediction_length": 8},
    "tvp": {"visual_prompt_size": 8, "num_frames": 2},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "voxtral": {"audio_config.intermediate_size": 256},
    "xcodec2": {"quantization_dim": 128, "encoder_hidden_size": 16},
    "xlstm": {"num_blocks": 2, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


class CannotBuild(RuntimeError):
    """A model that cannot be made here, and why."""


def _mappings() -> Iterator[dict[str, Any]]:
    """The classes by model type of all Auto classes, AutoModel first."""
    names = [name for name in vars(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)]
    yield modeling_auto.MODEL_MAPPING_NAMES
    yield from (getattr(modeling_auto, name) for name in names if name != "MODEL_MAPPING_NAMES")


def model_types() -> list[str]:
    """All model types that an Auto class knows."""
    known = set().union(*_mappings())
    return [model_type for model_type in CONFIG_MAPPING if model_type in known]


def model_class(model_type: str, auto: str = "AutoModel") -> type[PreTrainedModel] | None:
    """The class that an Auto class makes of a model type; for AutoModel, of the first Auto class that knows it."""
    if auto == "AutoModel":
        found = [mapping[model_type] for mapping in _mappings() if model_type in mapping]
    else:
        found = [getattr(transformers, auto)._model_mapping._model_mapping.get(model_type)]
    names = [name if isinstance(name, str) else name[0] for name in found if name is not None]
    kinds = [kind for name in names if (kind := _class(model_type, name)) is not None]
    # A few mappings name a part, such as the decoder, that has another configuration and a forward of its own.
    present = [kind for kind in kinds if not hasattr(kind, "_backends")]
    fits = [kind for kind in present if kind.config_class in {CONFIG_MAPPING[model_type], None}] or present
    fits = [kind for kind in fits if kind.forward is not nn.Module.forward] or fits
    return next(iter(fits or kinds), None)


def _class(model_type: str, name: str) -> type[PreTrainedModel] | None:
    """The class of a name; some are not exported at the top."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    package = model_type_to_module_name(model_type)
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    return getattr(module, name, None)


def _subconfigs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def _tokens(config: PreTrainedConfig) -> set[int]:
    """All ids of special tokens, of a configuration and of those in it."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if TOKEN.search(name):
            found |= {item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, int)}
    return found.union(*(_tokens(part) for part in _subconfigs(config).values()))


def _width(value: Any) -> Any:
    """A stage's width, of a list of them, a quarter."""
    if isinstance(value, (list, tuple)):
        return [_width(item) for item in value]
    return value // 4 if isinstance(value, int) and not isinstance(value, bool) and value >= 32 else value


def _cap(name: str, value: int) -> int:
    cap = next((cap for pattern, cap in CAPS if re.search(pattern, name)), -1)
    return value if cap < 0 else min(value, cap)


def _defaults(config: PreTrainedConfig) -> dict[str, Any]:
    """The defaults of the fields of a configuration's class; those that it computes are None."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = None if field.default is dataclasses.MISSING else field.default
    return {name: value for name, value in found.items() if name not in {"dtype", "transformers_version"}}


def _changed(config: PreTrainedConfig, fresh: dict[str, Any]) -> set[str]:
    """Names of the fields that have another value than in a fresh configuration."""
    fields = ((name, value) for name, value in vars(config).items() if name in fresh)
    return {name for name, value in fields if not isinstance(value, PreTrainedConfig) and value != fresh[name]}


def _choose_layers(config: PreTrainedConfig, layers: int) -> list[int]:
    """Layers to keep: the first of each kind, up to four; two at least, and as many as there are indices of layers."""
    if layers <= 2:
        return list(range(layers))
    lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    kinds = [value for value in lists.values() if len(value) == layers and isinstance(value[0], (str, int))]
    first: dict[Any, int] = {}
    for layer in range(layers):
        first.setdefault(tuple(kind[layer] for kind in kinds), layer)
    chosen = sorted(first.values())[:4]
    indexed = [len(value) for name, value in lists.items() if INDICES.search(name) and len(value) <= 4]
    missing = max([2, *indexed]) - len(chosen)
    others = [layer for layer in range(layers) if layer not in chosen]
    return sorted([*chosen, *others[: max(0, missing)]])


def _native(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, or that of a ResNet in place of a backbone of timm's."""
    if config.model_type == "timm_backbone":
        return CONFIG_MAPPING["resnet"](out_indices=list(config.out_indices or (4,)))
    return config


class _Shrinker:
    """Shrinks a default configuration and those in it."""

    def __init__(self, config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
        large = sorted(token for token in _tokens(config) if token >= KEPT_TOKENS)
        self.tokens = {token: KEPT_TOKENS + rank for rank, token in enumerate(large)}
        self.overrides = overrides

    def token(self, value: Any, vocabulary: int | None) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.token(item, vocabulary) for item in value]
        if (
            isinstance(vocabulary, int)
            and isinstance(value, int)  # some have a token past the vocabulary
            and vocabulary > VOCABULARY
            and value - vocabulary in {0, 1}
        ):
            return VOCABULARY + value - vocabulary
        return self.tokens.get(value, value)

    def rope(self, value: dict[str, Any]) -> dict[str, Any]:
        """Rotary parameters for heads of 16."""
        scaled: dict[str, Any] = {}
        for name, item in value.items():
            if isinstance(item, dict):
                scaled[name] = self.rope(item)
            elif name == "mrope_section" and len(item) == 3:
                scaled[name] = [2, 3, 3]
            elif name in {"long_factor", "short_factor"}:
                scaled[name] = item[:8]
            else:
                scaled[name] = item
        return scaled

    def shrink(self, config: PreTrainedConfig, path: str = "") -> PreTrainedConfig:
        """A tiny configuration of the same class, of the default one; `path` is where it lies, with a dot at its end."""
        defaults = _defaults(config)
        layers = next((vars(config)[name] for name in LAYERS if isinstance(vars(config).get(name), int)), 0)
        chosen = _choose_layers(config, layers)
        fresh = vars(type(config)()) if path else vars(config)
        given = _changed(config, fresh)
        multimodal = "mrope_section" in getattr(type(config), "ignore_keys_at_rope_validation", ())
        # What the configuration around it sets, and is no field of it, stays.
        kwargs: dict[str, Any] = {
            name: value
            for name, value in vars(config).items()
            if name not in fresh and name not in defaults and isinstance(value, (bool, int, float, str))
        }
        for name, default in defaults.items():
            stored = config.attribute_map.get(name, name)
            if stored not in vars(config):
                continue
            value = vars(config)[stored]
            if value is None and name in WANTED and (name != "head_dim" or "num_attention_heads" in defaults):
                value = WANTED[name]
            elif config.model_type in UNSCALED and "image" not in name and isinstance(value, (int, list, tuple)):
                if default is None and name not in given:
                    continue
            elif isinstance(value, PreTrainedConfig):
                value = self.shrink(_native(value), f"{path}{name}.")
            elif value is None or isinstance(value, (bool, str)):
                if default is None and name not in given and isinstance(value, str):
                    continue
            elif isinstance(value, (list, tuple)) and layers > 2 and len(value) == layers:
                kept = [self.number(name, value[layer], config) for layer in chosen]
                value = [chosen.index(layer) if layer in chosen else 0 for layer in kept] if "source" in name else kept
            elif name == "rope_parameters" and isinstance(value, dict) and (multimodal or "mrope_section" in value):
                half = int(8 * value.get("partial_rotary_factor", 1.0))
                value = {**value, "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]}
            elif default is None and name not in given and not TOKEN.search(name):
                if not isinstance(value, (list, tuple)) or (new := self.sequence(name, value, layers, len(chosen))) == value:
                    continue  # it is computed from others
                value = new
            elif TOKEN.search(name):
                value = self.token(value, vars(config).get("vocab_size"))
            elif isinstance(value, int):
                value = len(chosen) if name in LAYERS and value == layers else self.number(name, value, config)
            elif isinstance(value, float):
                if re.search(r"init\w*_(range|std)|init_std", name) and 0 < value < 0.1:
                    value = 0.1
            elif isinstance(value, dict) and "rope" in name:
                value = self.rope(value)
            elif isinstance(value, (list, tuple)):
                value = self.sequence(name, value, layers, len(chosen))
            kwargs[name] = value
        if "_out_indices" in given:
            kwargs.pop("_out_features", None)
            kwargs.pop("_out_indices", None)
            kwargs["out_indices"] = self.outputs(config.out_indices, layers if layers > 2 else 0, len(chosen))
        return type(config)(**self.adjusted(config, kwargs, path))

    def adjusted(self, config: PreTrainedConfig, kwargs: dict[str, Any], path: str) -> dict[str, Any]:
        """The fields with the sizes of images in a grid, and with what the model type wants otherwise."""
        if vars(config).get("image_grid_pinpoints"):
            size = kwargs["vision_config"].image_size
            kwargs["image_grid_pinpoints"] = [[size, size]]
        for where, value in self.overrides.items():
            if where.rpartition(".")[0] == path.rstrip("."):
                kwargs[where.rpartition(".")[2]] = value
        return kwargs

    def outputs(self, indices: list[int], layers: int, kept: int) -> list[int]:
        """The stages that a backbone gives, where each layer is one or where there are few."""
        if not layers or len(indices) > kept:
            return list(indices)
        scaled = list(dict.fromkeys(index * kept // layers for index in indices))
        return scaled if len(scaled) == len(indices) else list(range(kept - len(indices) + 1, kept + 1))

    def number(self, name: str, value: Any, config: PreTrainedConfig) -> Any:
        """A number, as small as its name allows."""
        if isinstance(value, (list, tuple)):
            return [self.number(name, item, config) for item in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if name in {"image_size", "pretrain_image_size", "crop_size", "img_size", "input_size", "max_img_size"}:
            patch = vars(config).get("patch_size")
            patch = patch if isinstance(patch, int) and not isinstance(patch, bool) else 4
            return min(value, max(4 * min(patch, 16), 64 // patch * patch)) if value > 16 else value
        if name == "patch_size":
            return min(value, 16)
        if name == "window_size" and value > 32:  # in pixels
            return value
        if re.search(r"(key_value|kv)_heads", name):
            return value if value == 1 else 4 if value == vars(config).get("num_attention_heads") and value >= 4 else 2
        staged = any(isinstance(vars(config).get(stage), (list, tuple)) for stage in STAGES)
        if staged and re.search(r"hidden|embed|dim|channels", name):
            return _width(value)
        return _cap(name, value)

    def sequence(self, name: str, value: Any, layers: int, kept: int) -> Any:
        """A list of numbers: of layers by stage, of widths, of layers' indices or of sizes of images."""
        if not value or not isinstance(value[0], (int, list, tuple)) or isinstance(value[0], bool):
            return value
        if re.search(r"^depths?$|num_blocks|numb_of_layers|^layers$|blocks_per_stage|num_layers|attn_blocks|repeats$", name):
            return [min(item, 2) if isinstance(item, int) else item for item in value]
        if name == "image_size":
            return [min(item, 64) for item in value]
        if name == "backbone_feature_sizes":
            return [[16, 16], [8, 8], [4, 4]]
        if INDICES.search(name) and layers > 2 and all(isinstance(item, int) for item in value):
            return list(dict.fromkeys(item * kept // layers if item >= 0 else max(item, -kept) for item in value))
        if re.search(r"kernel|stride|ratio|padding|factor|token|heads|size$|rates?$|group|dilat", name):
            return value
        if re.search(r"hidden_sizes|dims?(_per_stage)?$|channel(s|_list)|^conv_dim|feature_dims", name):
            return _width(value)
        return value


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of a model type, with few and narrow layers, a short vocabulary and small images."""
    config = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    config = _Shrinker(config, OVERRIDES.get(model_type, {})).shrink(_native(config))
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    return config


def tiny_model(model_type: str, auto: str = "AutoModel") -> PreTrainedModel:
    """A tiny model with random weights, the same ones each time, for evaluation.

    Raises:
        CannotBuild: if there is no such class, or it needs what is not here.
    """
    try:
        kind = model_class(model_type, auto)
        if kind is None:
            raise CannotBuild(f"{auto} has no {model_type}")
        if hasattr(kind, "_backends"):
            raise CannotBuild(f"{kind.__name__} needs {', '.join(kind._backends)}")
        if model_type in UNBUILDABLE and auto == "AutoModel":
            raise CannotBuild(UNBUILDABLE[model_type])
        if kind.forward is nn.Module.forward:
            raise CannotBuild(f"{kind.__name__} has no forward")
        config = tiny_config(model_type)
        if auto == "AutoModelForSequenceClassification" and hasattr(config, "pad_token_id"):
            config.pad_token_id = config.pad_token_id or 0  # for batches of more than one
        torch.manual_seed(0)
        model = kind(config)
    except (ImportError, OSError) as error:
        raise CannotBuild(" ".join(str(error).split())[:200]) from error
    return _calibrate(model.float().eval())


def _calibrate(model: PreTrainedModel) -> PreTrainedModel:
    """Give batch norms the mean and variance of a batch, without which the signal dies out in a deep network."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    try:
        inputs = example_inputs(model)
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        with torch.no_grad():
            model(**inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        pass  # a norm of a single value: the others keep what they have seen
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    return model
