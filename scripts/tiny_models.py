"""Tiny models of the architectures of transformers, with random weights: made from the default configurations, shrunk."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from tiny_inputs import example_inputs
from tiny_overrides import OVERRIDES, UNBUILDABLE
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["CannotBuild", "example_inputs", "model_class", "model_types", "tiny_config", "tiny_model"]

VOCABULARY = 256
KEPT_TOKENS = 100  # token ids below this are kept, the others get the ids from here on

# The first pattern that is found in the name of an integer attribute caps it.
CAPS: list[tuple[str, int]] = [
    (
        r"token|kernel|stride|ratio|factor|temperature|num_channels|loss|_cost|patch_|_ids?$|_period|_seed|^seed$|interval",
        -1,
    ),
    (r"mel_bins|sampling_rate|sample_rate|chunk_length|step|expand|hop_length|num_labels|merge_size|feature_levels", -1),
    (r"vocab(_size)?$|vocab_size_per|num_embeddings|num_classes|vocab_size_base", VOCABULARY),
    (r"codebook_size|codevectors|num_clusters", 64),
    (r"mamba.*heads|^ssm.*heads", 8),
    (r"(heads?|head_num)$|heads_per|^n_head", 4),
    (r"rope_head_dim|rotary_dim", 8),
    (r"head_(dim|size)|^d_kv$|kv_channels|dim_head|^d_head|mamba_d_head|linear_.*head_dim", 16),
    (r"_rank$|lowrank", 16),
    (r"experts?_per_tok|top_?k|num_selected", 2),
    (r"(num|n)_\w*shared_expert|n_group|topk_group|zero_expert", 2),
    (r"num_\w*experts|n_routed_experts|num_local", 4),
    (r"intermediate|ffn|feed_?forward|^d_ff$|d_inner|linear_units|mlp_(hidden_)?(dim|size)|expert_dim|ff_dim|inner_dim", 48),
    (r"adapter_layers|max_window_layers|nextn", -1),
    (r"layers?$|depth$|^num_blocks$|_num_layers|layers_per", 2),
    (r"max_\w*position|n_positions|max_seq_len|^n_ctx$|max_\w*length|positions$|max_pos_emb|context_length$", 128),
    (r"sliding_window(_size)?$|attention_chunk_size|local_attention|attention_window|^block_size$|^chunk_size$", 8),
    (r"num_\w*quer(y|ies)|latents$|latent_query|detection_tokens|query_num", 8),
    (r"hidden|embed|(^|_)dims?$|d_model|n_embd|width|channels|project\w*_size|output_size|_units|feature_size|_filters", 64),
    (r"state_size|d_state", 16),
]

# The names under which a configuration counts its layers; lists of that length hold a value for each.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "depth", "n_layers", "layers", "encoder_layers", "decoder_layers")
INDICES = re.compile(r"ind(ic|ex)es$|_idxs?$|layer_ids$|_layers$|hook_ids$")
TOKEN = re.compile(r"(token_(id|index|idx|ids)|(bos|eos|pad)_id)$")


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
        found = next((mapping[model_type] for mapping in _mappings() if model_type in mapping), None)
    else:
        found = getattr(transformers, auto)._model_mapping._model_mapping.get(model_type)
    if found is None:
        return None
    name = found if isinstance(found, str) else found[0]
    if not hasattr(transformers, name):  # some are not exported at the top
        package = transformers.models.auto.configuration_auto.model_type_to_module_name(model_type)
        module = __import__(f"transformers.models.{package}.modeling_{package}", fromlist=[name])
        return getattr(module, name)
    return getattr(transformers, name)


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


def _choose_layers(config: PreTrainedConfig, layers: int) -> list[int]:
    """Layers to keep: the first of each kind, up to four, and two at least."""
    kinds = [
        value
        for value in vars(config).values()
        if isinstance(value, (list, tuple)) and len(value) == layers and isinstance(value[0], (str, int))
    ]
    first: dict[Any, int] = {}
    for layer in range(layers):
        first.setdefault(tuple(kind[layer] for kind in kinds), layer)
    kept = sorted(first.values())[:4]
    return sorted({*kept, *range(2)})[:4] if len(kept) < 2 else kept


class _Shrinker:
    """Shrinks a default configuration and those in it."""

    def __init__(self, config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
        large = sorted(token for token in _tokens(config) if token >= KEPT_TOKENS)
        self.tokens = {token: KEPT_TOKENS + rank for rank, token in enumerate(large)}
        self.overrides = overrides

    def token(self, value: Any, vocabulary: int | None) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.token(item, vocabulary) for item in value]
        if isinstance(vocabulary, int) and isinstance(value, int) and value >= vocabulary > VOCABULARY:
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

    def shrink(self, config: PreTrainedConfig, given: dict[str, Any], path: str = "") -> PreTrainedConfig:
        """A tiny configuration of the same class.

        Args:
            config: the default.
            given: what the configuration around it sets in it.
            path: where it is, with a dot at its end.
        """
        defaults = {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(config)
            if field.name not in {"dtype", "transformers_version"}
        }
        for field in dataclasses.fields(config):
            if field.default_factory is not dataclasses.MISSING and field.name in defaults:
                defaults[field.name] = field.default_factory()
        layers = next((vars(config)[name] for name in LAYERS if isinstance(vars(config).get(name), int)), 0)
        indices = [len(v) for n, v in vars(config).items() if INDICES.search(n) and isinstance(v, (list, tuple))]
        chosen = _choose_layers(config, layers) if layers > 2 else list(range(layers))
        wanted = min(max([n for n in indices if n <= 4] or [0]), layers)
        chosen = chosen + [n for n in range(layers) if n not in chosen][: max(0, wanted - len(chosen))]
        chosen.sort()
        staged = any(isinstance(vars(config).get(name), (list, tuple)) for name in ("depths", "num_heads"))
        heads = vars(config).get("num_attention_heads")
        specs = type(config).sub_configs_defaults
        kwargs: dict[str, Any] = {}
        for name, default in defaults.items():
            value = getattr(config, name, None)
            if name not in vars(config) and value is None:
                continue
            if name == "head_dim" and value is None and heads:
                value = 16
            elif isinstance(value, PreTrainedConfig):
                inner = specs[name].init_kwargs if name in specs else {}
                value = self.shrink(value, inner, f"{path}{name}.")
            elif value is None or isinstance(value, bool) or (isinstance(value, str)):
                if default is None and name not in given and isinstance(value, str):
                    continue
            elif isinstance(value, (list, tuple)) and layers > 2 and len(value) == layers:
                value = [self.number(name, value[layer], heads, staged, config) for layer in chosen]
            elif default is None and name not in given and not TOKEN.search(name):
                continue  # it is computed from others
            elif TOKEN.search(name):
                value = self.token(value, vars(config).get("vocab_size"))
            elif isinstance(value, int):
                value = (
                    len(chosen) if name in LAYERS and value == layers else self.number(name, value, heads, staged, config)
                )
            elif isinstance(value, float):
                if re.search(r"init\w*_(range|std)|init_std", name) and 0 < value < 0.1:
                    value = 0.1
            elif isinstance(value, dict) and "rope" in name:
                value = self.rope(value)
            elif isinstance(value, (list, tuple)):
                value = self.sequence(name, value, layers, len(chosen))
            kwargs[name] = value
        for where, value in self.overrides.items():
            if where.rpartition(".")[0] == path.rstrip("."):
                kwargs[where.rpartition(".")[2]] = value
        return type(config)(**kwargs)

    def number(self, name: str, value: Any, heads: Any, staged: bool, config: PreTrainedConfig) -> Any:
        """A number, as small as its name allows."""
        if isinstance(value, (list, tuple)):
            return [self.number(name, item, heads, staged, config) for item in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if name in {"image_size", "pretrain_image_size", "crop_size", "img_size", "input_size", "max_img_size"}:
            patch = vars(config).get("patch_size")
            patch = patch if isinstance(patch, int) and not isinstance(patch, bool) else 4
            return min(value, max(4 * min(patch, 16), 64 // patch * patch)) if value > 16 else value
        if name == "patch_size":
            return min(value, 16)
        if re.search(r"(key_value|kv)_heads", name):
            return value if value == 1 else 4 if value == heads and value >= 4 else 2
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
        if INDICES.search(name) and layers > 2 and all(isinstance(item, int) for item in value):
            return list(dict.fromkeys(item * kept // layers if item >= 0 else max(item, -kept) for item in value))
        if re.search(r"kernel|stride|ratio|padding|factor|token|heads|size$|rates?$|group|dilat", name):
            return value
        if re.search(r"hidden_sizes|dims?(_per_stage)?$|channels|^conv_dim|feature_dims", name):
            return _width(value)
        return value


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of a model type, with few and narrow layers, a short vocabulary and small images."""
    config = CONFIG_MAPPING[model_type]()
    return _Shrinker(config, OVERRIDES.get(model_type, {})).shrink(config, {})


def tiny_model(model_type: str, auto: str = "AutoModel") -> PreTrainedModel:
    """A tiny model with random weights, the same ones each time, for evaluation.

    Raises:
        CannotBuild: if there is no such class, or it needs what is not here.
    """
    if model_type in UNBUILDABLE:
        raise CannotBuild(UNBUILDABLE[model_type])
    try:
        kind = model_class(model_type, auto)
        if kind is None:
            raise CannotBuild(f"{auto} has no {model_type}")
        config = tiny_config(model_type)
        torch.manual_seed(0)
        model = kind(config)
    except (ImportError, OSError) as error:
        raise CannotBuild(" ".join(str(error).split())[:200]) from error
    return model.float().eval()
