"""Inputs by the name of a model's main input: those of plain encoders and decoders of text, images and sounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def inputs_by_main_input(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two texts or images, or one sound, as the name of the model's main input and the top of its config tell.

    Raises:
        ValueError: the main input is of another kind.
        AttributeError: the config has no size for it.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    names = {model.main_input_name}
    if text is not config and vision is not config:
        names |= {"input_ids", "pixel_values"}
    batch: dict[str, Tensor] = {}
    if "input_ids" in names:
        batch["input_ids"] = torch.randint(0, text.vocab_size, (2, 8), generator=generator)
    if "pixel_values" in names:
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        batch["pixel_values"] = torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=generator)
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 50)
        batch["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=generator)
    if "input_values" in names:
        batch["input_values"] = torch.randn(1, 4000, generator=generator)
    if not batch:
        raise ValueError(f"its main input is {model.main_input_name}")
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(0, text.vocab_size, (batch[min(batch)].shape[0], 4), generator=generator)
    return batch
