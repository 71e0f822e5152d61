"""Turns texts, images and rows of tensors into a batch for a model's forward.

Imports torch: commands import it when run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .shared import first
from .work import UsageError

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]
_READY = "pass a .safetensors file with what its forward takes, {name: (examples, …)}"
_MAX = 1_000_000  # tokenizers say 1e30 where they know no limit


def tokenised(
    model: PreTrainedModel, folder: Path, max_length: int, trust_remote_code: bool, texts: Sequence[str]
) -> Collate:
    """Texts → input_ids, attention_mask …, padded; of an encoder-decoder the decoder gets the same text.

    Args:
        texts: all of them: how many are cut is said.
    """
    _check_input(model, "input_ids", "texts")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"{str(folder)!r} holds no tokenizer for the texts ({error}): {_READY}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers makes an empty one where there is no file
        raise UsageError(f"{str(folder)!r} holds no tokenizer for the texts: {_READY}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    limits = [max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or _MAX]
    length = min(limit for limit in limits if limit > 0)
    if first():
        _tell_of_cuts(tokenizer, texts, length, ", as many as the model takes" if length < max_length else "")

    def collate(texts: Sequence[str]) -> dict[str, Tensor]:
        padding = tokenizer.pad_token is not None
        batch = dict(tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"))
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            ids = batch["input_ids"]
            batch["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start or 0), ids[:, :-1]], dim=1)
            batch["decoder_attention_mask"] = batch["attention_mask"]
        return batch

    return collate


def _tell_of_cuts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, why: str) -> None:
    """Says on stderr how many of the texts are longer than `length` tokens."""
    tokens = tokenizer(list(texts), truncation=True, max_length=length + 1)["input_ids"]
    cut = sum(len(each) > length for each in tokens)
    if cut:
        print(f"{cut} of {len(texts)} texts have more than {length} tokens and are cut to these{why}", file=sys.stderr)


def pictures(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> Collate:
    """Image files or pictures → pixel_values, in the model's dtype."""
    _check_input(model, "pixel_values", "images")
    from PIL import Image

    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"{str(folder)!r} holds no image processor for the images ({error}): {_READY}") from error

    def opened(item: Any) -> Any:
        if not isinstance(item, Path):
            return item.convert("RGB")
        try:
            with Image.open(item) as picture:
                return picture.convert("RGB")
        except OSError as error:
            raise UsageError(f"{str(item)!r} is no image that can be read: {error}") from error

    def collate(items: Sequence[Any]) -> dict[str, Tensor]:
        made = processor(images=[opened(item) for item in items], return_tensors="pt")
        return {name: _cast(value, model) for name, value in made.items()}

    return collate


def stacked(model: PreTrainedModel) -> Collate:
    """Rows of tensors → batches as they are."""

    def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        names = {name: name or model.main_input_name for name in rows[0]}
        return {names[name]: _cast(torch.stack([row[name] for row in rows]), model) for name in rows[0]}

    return collate


def label_of(model: PreTrainedModel, names: Sequence[str] | None = None) -> Callable[[Any], Any]:
    """A label as the model's loss takes it: a name becomes the model's number.

    Args:
        names: of the data's own numbers, which stand for them where the model knows them all.

    Raises:
        UsageError: from what is returned, for a name that the model does not know, or a number that it does not have.
    """
    known = getattr(model.config, "label2id", None) or {}
    numbers = {str(name).lower(): number for name, number in known.items()}
    own = [numbers.get(name.lower()) for name in names or ()]
    by_name = bool(own) and None not in own
    count = len(own) if by_name else model.config.num_labels or 0

    def label(value: Any) -> Any:
        if isinstance(value, int) and count > 1 and not 0 <= value < count:
            raise UsageError(f"the label {value} is none of 0 to {count - 1}: leave out what has no label, or another")
        if isinstance(value, int) and by_name:
            return own[value]
        if isinstance(value, str):
            if value not in known:
                raise UsageError(
                    f"the model knows no label {value!r}: its config has {', '.join(map(str, known)) or 'none'}"
                )
            return known[value]
        return value

    return label


def _check_input(model: PreTrainedModel, name: str, what: str) -> None:
    if model.main_input_name != name:
        raise UsageError(f"{type(model).__name__} takes {model.main_input_name}, and the data are {what}: {_READY}")


def _cast(tensor: Tensor, model: PreTrainedModel) -> Tensor:
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor
