"""Inputs that a model's own tokenizer or processor makes, of two short texts, two small images or a second of noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..batches import accepted_names
from .maker import Maker

_TEXTS = ("A small example.", "Another one, which is a little longer.")
_SIDE = 64  # of an image, before the processor makes of it what the model takes
_RATE = 16_000  # samples by second, where a feature extractor names no other
_SHIFTED = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")


def inputs_by_processor(model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
    """What a tokenizer, an image processor, a feature extractor or a processor of several makes, cut to what forward takes.

    An encoder-decoder model's decoder gets a few tokens. The same ones each time.

    Raises:
        Whatever the processor does not bear.
    """
    made: dict[str, Any] = {}
    for item in processor if isinstance(processor, (list, tuple)) else [processor]:
        made |= dict(_processed(item))
    names = accepted_names(model)
    batch = {n: v for n, v in made.items() if isinstance(v, Tensor) and (names is None or n in names)}
    if not batch:
        raise ValueError(f"{type(processor).__name__} makes {', '.join(made) or 'nothing'}, of which forward takes nothing")
    wants_decoder = names is not None and "decoder_input_ids" in names and "decoder_input_ids" not in batch
    if wants_decoder and getattr(model.config, "is_encoder_decoder", False) and not type(model).__name__.endswith(_SHIFTED):
        batch["decoder_input_ids"] = Maker(model, next(iter(batch.values())).shape[0]).text(4)
    return batch


def _processed(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor if hasattr(processor, "pad_token") else None)
    sees = getattr(processor, "image_processor", processor if hasattr(processor, "image_mean") else None) is not None
    hearing = getattr(processor, "feature_extractor", processor if hasattr(processor, "sampling_rate") else None)
    options: dict[str, Any] = {"return_tensors": "pt"}
    if tokenizer is not None:
        marks = "".join(
            getattr(processor, f"{kind}_token", "") or "" for kind in ("image", "audio") if processor is not tokenizer
        )
        options["text"] = [marks + text for text in (_TEXTS if tokenizer.pad_token is not None else _TEXTS[:1])]
        options["padding"] = tokenizer.pad_token is not None
    if sees:
        images = np.random.default_rng(0).integers(0, 256, (2, _SIDE, _SIDE, 3), dtype=np.uint8)
        options["images"] = list(images[: len(options.get("text", images))])
    if hearing is not None:
        rate = getattr(hearing, "sampling_rate", _RATE)
        options["sampling_rate"] = rate
        noise = np.random.default_rng(0).standard_normal(rate, dtype=np.float32) * 0.1
        if tokenizer is None:
            return processor(noise, **options)
        options["audio"] = [noise] * len(options["text"])
    return processor(**options)
