"""Inputs by the names that the signature of forward gives them, and the sizes in the config."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from .config_search import find
from .maker import FRAMES, SOUND, Maker
from .senses import features, image, series, sound


def all_inputs(x: Maker) -> dict[str, Any]:
    """All inputs: those of the senses, then the text with their tokens, then the rest."""
    # in this order, as all draw from one generator
    _senses(x)
    _prompts(x)
    if "past_values" in x.names:
        series(x)
    _texts(x)
    return x.made


def _senses(x: Maker) -> None:
    """Images, spectrograms and sounds, and their masks."""
    names, config, made, batch = x.names, x.config, x.made, x.batch
    absent = {name for name in ("vision_config", "audio_config") if getattr(config, name, ...) is None}
    if "pixel_values" in names and "vision_config" not in absent:
        made["pixel_values"] = image(x)
    elif "hidden_states" in names and "grid_thw" in names:
        made["hidden_states"] = image(x)
    elif "pixel_values_videos" in names and "input_ids" not in names:
        made["pixel_values_videos"] = image(x)
    if "input_features" in names and "audio_config" not in absent:
        made["input_features"] = features(x)
        if "input_features_mask" in names and not config.model_type.startswith("granite_speech"):
            frames = made["input_features"].shape[-1] if find(x.audio, "n_window") else FRAMES
            made["input_features_mask"] = torch.ones(
                batch, frames, dtype=torch.bool if config.model_type.startswith("gemma4") else torch.long
            )
        if "feature_attention_mask" in names:
            made["feature_attention_mask"] = torch.ones(batch, made["input_features"].shape[-1], dtype=torch.long)
    if "input_values" in names and "decoder_input_values" not in names:
        made["input_values"] = sound(x)
    if names >= {"padding_mask", "input_ids"} and made.keys() & {"input_values", "input_features"}:
        made["padding_mask"] = torch.ones(batch, SOUND, dtype=torch.bool)


def _prompts(x: Maker) -> None:
    """What comes with an image or a sound: points, masks, depths, lengths, a second resolution."""
    names, config, made, batch = x.names, x.config, x.made, x.batch
    if "merge_sizes" in names or "image_merge_sizes" in names:
        made["merge_sizes" if "merge_sizes" in names else "image_merge_sizes"] = torch.ones(batch, dtype=torch.long)
    if "input_points" in names:
        made["input_points"] = torch.rand(batch, 1, 2, 2, generator=x.generator) * 32
        made["input_labels"] = torch.ones(batch, 1, 2, dtype=torch.long)
    if "input_masks" in names:
        side = 4 * find(config.prompt_encoder_config, "image_size") // find(config.prompt_encoder_config, "patch_size")
        made["input_masks"] = x.normal(batch, 1, side, side)
    if "prompt_depth" in names:
        made["prompt_depth"] = torch.rand(batch, 1, *x.size(x.vision), generator=x.generator)
    if "chunk_sample_lengths" in names:
        made["chunk_sample_lengths"] = torch.full((batch,), FRAMES * find(x.audio, "hop_length"))
    if "high_res_pixel_values" in names:
        made["high_res_pixel_values"] = x.normal(batch, 3, *x.size(config.high_res_vision_config))


def _texts(x: Maker) -> None:
    """Tokens for the encoder and the decoder, and where on a page they are."""
    names, config, made = x.names, x.config, x.made
    if "input_ids" in names:
        ids = x.text()
        if "mm_token_type_ids" in names:
            made["mm_token_type_ids"] = torch.zeros_like(ids)
        for kind, name in (("image", "pixel_values"), ("audio", "input_features"), ("audio", "input_values")):
            if name in made:
                ids = x.place(ids, kind)
        made["input_ids"] = ids
        if "attention_mask" in names:
            made["attention_mask"] = torch.ones_like(ids)
    if names >= {"input_ids", "decoder_input_ids", "input_features"}:
        del made["input_ids"], made["attention_mask"]  # a text or a sound, not both
    if "decoder_input_ids" in names:
        decoder = getattr(config, "decoder", None)
        made["decoder_input_ids"] = x.text(8, decoder if isinstance(decoder, PreTrainedConfig) else None)
    if "bbox" in names:
        corners = x.integers(0, 50, x.batch, made["input_ids"].shape[1], 2)
        made["bbox"] = torch.cat([corners, corners + 10], -1)
