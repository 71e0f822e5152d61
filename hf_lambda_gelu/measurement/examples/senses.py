"""Inputs for the senses: images and what stands for them, spectrograms, sounds, time series."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config_search import BINS, find
from .maker import FRAMES, GRID, SOUND, Maker


def image(x: Maker) -> Tensor:
    """Images, or what stands for them: flat patches, tiles of images or frames of a video."""
    vision, names = x.vision, x.names
    channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
    height, width = x.size(vision)
    patch = x.patch(vision)
    batch = x.batch
    if names & {"image_grid_thw", "grid_thw"}:
        name = "grid_thw" if "grid_thw" in names else "image_grid_thw"
        x.made[name] = torch.tensor([[1, GRID, GRID]] * batch)
        flat = channels * find(vision, "temporal_patch_size", default=1) * patch * patch
        for label, module in x.model.named_modules():
            if label.endswith("patch_embedding") and isinstance(module, nn.Linear):
                flat = module.in_features
        return x.normal(batch * GRID * GRID, flat)
    if "image_grid_hw" in names and "input_ids" in names:
        x.made["image_grid_hw"] = torch.tensor([[GRID, GRID]] * batch)
        return x.normal(batch * GRID * GRID, channels * patch * patch)
    if "target_sizes" in names:
        x.made["target_sizes"] = torch.tensor([[GRID, GRID]] * batch)
        return x.normal(1, channels, patch, batch * GRID * GRID * patch)
    if "spatial_shapes" in names:
        x.made["spatial_shapes"] = torch.tensor([[GRID, GRID]] * batch)
        x.made["pixel_attention_mask"] = torch.ones(batch, GRID * GRID, dtype=torch.long)
        return x.normal(batch, GRID * GRID, channels * patch * patch)
    if names & {"image_position_ids", "pixel_position_ids"}:
        name = "pixel_position_ids" if "pixel_position_ids" in names else "image_position_ids"
        steps, patch = torch.arange(GRID), getattr(vision, "model_patch_size", patch)
        x.made[name] = torch.cartesian_prod(steps, steps).flip(-1).repeat(batch, 1, 1)
        return torch.rand(batch, GRID * GRID, channels * patch * patch, generator=x.generator)
    if "image_sizes" in names and (vision.model_type == "pixtral" or find(x.config, "image_grid_pinpoints", "vq_config")):
        x.made["image_sizes"] = torch.tensor([[height, width]] * batch)
        if find(x.config, "image_grid_pinpoints"):
            return x.normal(batch, 2, channels, height, width)
    if "pixel_attention_mask" in names or x.config.model_type == "colmodernvbert":
        if "tile_fine_mask" in names:
            x.made["pixel_attention_mask"] = torch.ones(batch, 1, dtype=torch.bool)
        return x.normal(batch, 1, channels, height, width)
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
    if frames:
        return x.normal(batch, frames, channels, height, width)
    return x.normal(batch, channels, height, width)


def features(x: Maker) -> Tensor:
    """A spectrogram: its bins come first where a convolution takes them as its channels."""
    bins = find(x.audio, *BINS, default=80) * find(x.audio, "num_stacked_frames", default=1)
    if channels := find(x.audio, "subsampling_conv_channels"):
        bins = channels[0] if isinstance(channels, (list, tuple)) else bins
    if window := find(x.audio, "n_window"):
        return x.normal(x.batch, bins, 2 * window)
    frames = FRAMES
    for name, module in x.model.named_modules():
        if name.endswith("input_linear"):
            bins = module.in_features
        if name.endswith("conv1") and isinstance(module, nn.Conv1d) and module.in_channels == bins:
            positions = find(x.audio, "max_source_positions")
            return x.normal(x.batch, bins, 2 * positions if positions else frames)
    return x.normal(x.batch, frames, bins)


def sound(x: Maker) -> Tensor:
    """A sound, with its channels where a model names them."""
    if x.names & {"padding_mask", "audio_codes", "n_quantizers", "sample"}:
        return x.normal(x.batch, find(x.audio, "audio_channels", "channels", default=1), SOUND)
    return x.normal(x.batch, SOUND)


def series(x: Maker) -> None:
    """The past, and the future, of a time series."""
    config, batch = x.config, x.batch
    context = find(config, "context_length", default=32)
    if "past_time_features" in x.names:
        past, ahead = context + max(config.lags_sequence), config.prediction_length
        x.made["past_values"], x.made["future_values"] = x.normal(batch, past), x.normal(batch, ahead)
        x.made["past_observed_mask"] = torch.ones(batch, past)
        x.made["past_time_features"] = x.normal(batch, past, config.num_time_features)
        x.made["future_time_features"] = x.normal(batch, ahead, config.num_time_features)
    elif "freq" in x.names or "past_values_padding" in x.names:
        x.made["past_values"] = x.normal(batch, context)
    else:
        x.made["past_values"] = x.normal(batch, context, find(config, "num_input_channels", default=1))
