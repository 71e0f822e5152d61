"""Inputs of tiny models, made from the signature of forward and the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

TEXT = 12  # tokens of a text
SOUND = 3840  # samples of a sound
FRAMES = 64  # frames of a spectrogram
GRID = 4  # patches by side of an image that comes as patches

VISION = ("vision_config", "vision_encoder_config", "image_encoder", "vit_config", "qformer_config", "backbone_config", "encoder")
AUDIO = ("audio_config", "audio_encoder_config", "speech_config", "encoder_config", "encoder", "acoustic_tokenizer_encoder_config")
BINS = ("num_mel_bins", "n_mels", "input_feat_size", "feature_projection_input_dim", "input_feat_per_channel", "n_mel_bins")
BINS = (*BINS, "mel_bins", "feature_size", "input_size", "input_dim", "model_in_channels", "num_mels")


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
            value = getattr(item, name, None)
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
                found |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return found


def _rows(features: Any) -> int:
    """How many vectors an output of get_image_features holds, in all."""
    for name in ("pooler_output", "last_hidden_state"):
        if not isinstance(features, (Tensor, list, tuple)) and getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(_rows(item) for item in features)


class _Inputs:
    """Makes the inputs of one model."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.model, self.config, self.batch = model, model.config, batch
        self.names = set(inspect.signature(model.forward).parameters)
        self.generator = torch.Generator().manual_seed(0)
        self.vision, self.audio = part(self.config, VISION), part(self.config, AUDIO)
        self.made: dict[str, Any] = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def text(self, length: int = TEXT, config: PreTrainedConfig | None = None, vocabulary: int | None = None) -> Tensor:
        """Tokens without a meaning of their own, and the one of the end, if any."""
        config = config or self.config
        inner = config.get_text_config()
        size = vocabulary or getattr(inner, "vocab_size", None) or find(config, "vocab_size", default=100)
        special = special_tokens(self.config)
        plain = torch.tensor([token for token in range(2, size) if token not in special] or [0])
        ids = plain[self.integers(0, len(plain), self.batch, length)]
        end = getattr(inner, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < size:
            ids[:, -1] = end
        return ids

    def size(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Height and width of images."""
        size = find(config, "image_size", "img_size", "crop_size", "input_size", default=64)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        return int(size[0]), int(size[1])

    def patch(self, config: PreTrainedConfig) -> int:
        patch = find(config, "patch_size", default=16)
        return patch[-1] if isinstance(patch, (list, tuple)) else patch

    def image(self, *before: int) -> Tensor:
        """Images, or what stands for them: flat patches, tiles of images or frames of a video."""
        vision, names = self.vision, self.names
        channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
        height, width = self.size(vision)
        patch = self.patch(vision)
        batch = self.batch
        if names & {"image_grid_thw", "grid_thw"}:
            name = "grid_thw" if "grid_thw" in names else "image_grid_thw"
            self.made[name] = torch.tensor([[1, GRID, GRID]] * batch)
            depth = find(vision, "temporal_patch_size", default=1)
            return self.normal(batch * GRID * GRID, channels * depth * patch * patch)
        if "spatial_shapes" in names:
            self.made["spatial_shapes"] = torch.tensor([[GRID, GRID]] * batch)
            self.made["pixel_attention_mask"] = torch.ones(batch, GRID * GRID, dtype=torch.long)
            return self.normal(batch, GRID * GRID, channels * patch * patch)
        if names & {"image_position_ids", "pixel_position_ids"}:
            name = "pixel_position_ids" if "pixel_position_ids" in names else "image_position_ids"
            steps = torch.arange(GRID)
            self.made[name] = torch.cartesian_prod(steps, steps).flip(-1).repeat(batch, 1, 1)
            return torch.rand(batch, GRID * GRID, channels * patch * patch, generator=self.generator)
        if "image_sizes" in names:
            self.made["image_sizes"] = torch.tensor([[height, width]] * batch)
            if find(self.config, "image_grid_pinpoints"):
                return self.normal(batch, 2, channels, height, width)
        if "pixel_attention_mask" in names:
            return self.normal(batch, 1, channels, height, width)
        frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
        if frames:
            return self.normal(batch, frames, channels, height, width)
        return self.normal(batch, channels, height, width)

    def features(self) -> Tensor:
        """A spectrogram: its bins come first where a convolution takes them as its channels."""
        bins = find(self.audio, *BINS, default=80)
        frames = FRAMES
        for module in self.model.modules():
            if isinstance(module, nn.Conv1d) and module.in_channels == bins and module.kernel_size[0] == 3:
                positions = find(self.audio, "max_source_positions")
                frames = 2 * positions if positions else frames
                return self.normal(self.batch, bins, frames)
        return self.normal(self.batch, frames, bins)

    def sound(self) -> Tensor:
        """A sound, with its channels where a model names them."""
        if "padding_mask" in self.names or hasattr(self.audio, "audio_channels"):
            return self.normal(self.batch, find(self.audio, "audio_channels", "channels", default=1), SOUND)
        return self.normal(self.batch, SOUND)

    def place(self, ids: Tensor, kind: str) -> Tensor:
        """Tokens, with as many of a kind put after the first one as the model makes features of its inputs."""
        token = next(
            (
                token
                for suffix in ("token_id", "token_index")
                for prefix in (kind, f"{kind}_patch", "media_placeholder" if kind == "image" else kind)
                if isinstance(token := find(self.config, f"{prefix}_{suffix}"), int)
            ),
            None,
        )
        encode = getattr(self.model, f"get_{kind}_features", None)
        if encode is None and (base := getattr(self.model, "base_model", None)) is not None:
            encode = getattr(base, f"get_{kind}_features", None)
        if token is None or encode is None:
            return ids
        takes = inspect.signature(encode).parameters
        with torch.no_grad():
            rows = _rows(encode(**{name: value for name, value in self.made.items() if name in takes}))
        per = rows // self.batch
        block = torch.full((self.batch, per), token)
        if "mm_token_type_ids" in self.names:
            before = self.made.get("mm_token_type_ids", torch.zeros_like(ids))
            kinds = torch.full((self.batch, per), 1 if kind == "image" else 3)
            self.made["mm_token_type_ids"] = torch.cat([before[:, :1], kinds, before[:, 1:]], 1)
        return torch.cat([ids[:, :1], block, ids[:, 1:]], 1)

    def series(self) -> None:
        """The past, and the future, of a time series."""
        config, batch = self.config, self.batch
        context = find(config, "context_length", default=32)
        if "past_time_features" in self.names:
            past, ahead = context + max(config.lags_sequence), config.prediction_length
            self.made["past_values"], self.made["future_values"] = self.normal(batch, past), self.normal(batch, ahead)
            self.made["past_observed_mask"] = torch.ones(batch, past)
            self.made["past_time_features"] = self.normal(batch, past, config.num_time_features)
            self.made["future_time_features"] = self.normal(batch, ahead, config.num_time_features)
        elif "freq" in self.names or "past_values_padding" in self.names:
            self.made["past_values"] = self.normal(batch, context)
        else:
            self.made["past_values"] = self.normal(batch, context, find(config, "num_input_channels", default=1))

    def all(self) -> dict[str, Any]:
        """All inputs: those of the senses, then the text with their tokens, then the rest."""
        names, config, made, batch = self.names, self.config, self.made, self.batch
        if "pixel_values" in names:
            made["pixel_values"] = self.image()
        elif "hidden_states" in names and "grid_thw" in names:
            made["hidden_states"] = self.image()
        elif "pixel_values_videos" in names and "input_ids" not in names:
            made["pixel_values_videos"] = self.image()
        if "input_features" in names:
            made["input_features"] = self.features()
            if "input_features_mask" in names:
                made["input_features_mask"] = torch.ones(batch, FRAMES, dtype=torch.long)
            if "feature_attention_mask" in names:
                made["feature_attention_mask"] = torch.ones(batch, made["input_features"].shape[-1], dtype=torch.long)
        if "input_values" in names and "decoder_input_values" not in names:
            made["input_values"] = self.sound()
        if "past_values" in names:
            self.series()
        if "input_ids" in names:
            ids = self.text()
            if "mm_token_type_ids" in names:
                made["mm_token_type_ids"] = torch.zeros_like(ids)
            for kind, name in (("image", "pixel_values"), ("audio", "input_features"), ("audio", "input_values")):
                if name in made:
                    ids = self.place(ids, kind)
            made["input_ids"] = ids
            if "attention_mask" in names:
                made["attention_mask"] = torch.ones_like(ids)
        if "decoder_input_ids" in names:
            decoder = getattr(config, "decoder", None)
            made["decoder_input_ids"] = self.text(8, decoder if isinstance(decoder, PreTrainedConfig) else None)
        if "bbox" in names:
            corners = self.integers(0, 50, batch, made["input_ids"].shape[1], 2)
            made["bbox"] = torch.cat([corners, corners + 10], -1)
        return made


SPECIAL: dict[str, Callable[[_Inputs], dict[str, Any]]] = {}


def example_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Inputs that forward takes, the same ones each time.

    Args:
        model: a model of tiny_model.
        batch_size: how many texts, images or sounds.
    """
    inputs = _Inputs(model, batch_size)
    made = SPECIAL[model.config.model_type](inputs) if model.config.model_type in SPECIAL else inputs.all()
    if type(model).__name__.endswith("ForMultipleChoice"):
        made = {name: value.unsqueeze(1).expand(-1, 2, *value.shape[1:]) for name, value in made.items()}
    return made
