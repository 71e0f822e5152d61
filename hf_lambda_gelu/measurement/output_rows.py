"""What a model puts out at tokens: what it puts out at padding, nobody looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..structure.config import config_of
from .audio_masks import frame_mask
from .towers import decoder_mask, key_mask


def output_rows(output: Tensor, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
    """An output (…, features) as (rows, features), without the rows of padding where a mask fits its leading shape.

    It does not fit where the model puts out something else than tokens (a class for each example): then every row counts.

    Args:
        batch: what the model was run on. Of an encoder-decoder model the decoder's padding counts, of sounds that of their
            frames.
        model: None for a network that is neither.
    """
    flat = output.reshape(-1, output.shape[-1])
    mask = _output_mask(output, batch, model)
    if mask is None or bool(mask.all()):
        return flat
    if output.shape[:-1] == mask.shape or (output.dim() == 2 and len(flat) == mask.numel()):
        return flat[mask.reshape(-1).to(flat.device)]
    return flat


def _output_mask(output: Tensor, batch: Mapping[str, Any], model: nn.Module | None) -> Tensor | None:
    """(batch, length), True where an output is no padding; None if the batch does not say."""
    if model is not None and bool(getattr(config_of(model), "is_encoder_decoder", False)):
        return decoder_mask(model, batch)
    mask = key_mask(batch, 1, "attention_mask")
    if mask is None or model is None or output.dim() != 3 or output.shape[1] == mask.shape[1]:
        return mask
    return frame_mask(model, mask, output.shape[1])
