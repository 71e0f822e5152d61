"""Finds in a config, and in those inside it, what inputs are made by: sizes, token ids, the configs of the senses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

# Under which names a config keeps those of its senses, and the width of a spectrogram.
VISION = (
    "vision_config",
    "vision_encoder_config",
    "image_encoder",
    "vit_config",
    "qformer_config",
    "backbone_config",
    "encoder",
)
AUDIO = (
    "audio_config",
    "audio_encoder_config",
    "speech_config",
    "encoder_config",
    "encoder",
    "acoustic_tokenizer_encoder_config",
)
BINS = (
    "input_size",
    "num_mel_bins",
    "n_mels",
    "input_feat_size",
    "feature_projection_input_dim",
    "input_feat_per_channel",
    "n_mel_bins",
    "mel_bins",
    "feature_size",
    "input_dim",
    "model_in_channels",
    "num_mels",
    "audio_embed_dim",
)


def subconfigs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and all in it, the outer ones first."""
    queue = [config]
    for item in queue:
        yield item
        queue += [value for value in vars(item).values() if isinstance(value, PreTrainedConfig)]


def find(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of the attributes that is set in a configuration or in those in it."""
    for item in subconfigs(config):
        for name in names:
            value = vars(item).get(item.attribute_map.get(name, name))
            if value is not None:
                return value
    return default


def part(config: PreTrainedConfig, names: tuple[str, ...]) -> PreTrainedConfig:
    """The innermost configuration under one of the names, or the configuration itself."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            return part(value, names)
    return config


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """Ids with a meaning of their own, of the configuration and of all in it."""
    found: set[int] = set()
    for item in subconfigs(config):
        for name, value in vars(item).items():
            if "token" in name or name.endswith(("_id", "_index")):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    return found
