"""What all inputs are made with: the model, its config, random numbers, and the inputs made so far."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .config_search import AUDIO, VISION, find, part, special_tokens

TEXT = 12  # tokens of a text
SOUND = 3840  # samples of a sound
FRAMES = 64  # frames of a spectrogram
GRID = 4  # patches by side of an image that comes as patches


def vectors_in(features: Any) -> int:
    """How many vectors an output of get_image_features holds, in all."""
    if getattr(features, "deepstack_features", None) and getattr(features, "pooler_output", None) is None:
        features = features.deepstack_features[0][1]
    for name in ("pooler_output", "last_hidden_state"):
        if not isinstance(features, (Tensor, list, tuple)) and getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(vectors_in(item) for item in features)


def fitting(model: PreTrainedModel, value: Tensor) -> Tensor:
    """A tensor on the model's device, floating point in its dtype."""
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


class Maker:
    """Makes the inputs of one model.

    Attributes:
        batch: how many examples there are.
        names: of forward's arguments.
        vision, audio: the innermost configs of the senses.
        made: the inputs so far; some are made to fit others.
    """

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

    def text(self, length: int = TEXT, config: PreTrainedConfig | None = None) -> Tensor:
        """Tokens without a meaning of their own, and the one of the end, if any."""
        config = config or self.config
        inner = config.get_text_config()
        size = getattr(inner, "vocab_size", None) or find(config, "vocab_size", default=100)
        special = special_tokens(self.config)
        plain = torch.tensor([token for token in range(2, size) if token not in special] or [0])
        ids = plain[self.integers(0, len(plain), self.batch, length)]
        end = getattr(inner, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < size:
            ids[:, -1] = end
        return ids

    def words(self) -> dict[str, Any]:
        """A text and its mask."""
        ids = self.text()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def size(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Height and width of images."""
        size = find(config, "image_size", "img_size", "crop_size", "input_size", "max_img_size", default=64)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        return int(size[0]), int(size[1])

    def patch(self, config: PreTrainedConfig) -> int:
        patch = find(config, "patch_size", default=16)
        return int(patch[-1] if isinstance(patch, (list, tuple)) else patch)

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
        for inner in ("base_model", "encoder"):
            encode = encode or getattr(getattr(self.model, inner, None), f"get_{kind}_features", None)
        if token is None or encode is None:
            return ids
        takes = inspect.signature(encode).parameters
        if "vision_start_token_id" in vars(self.config) and kind == "image":
            ids[:, 0] = self.config.vision_start_token_id
        with torch.no_grad():
            inputs = {name: fitting(self.model, value) for name, value in self.made.items() if name in takes}
            vectors = vectors_in(encode(**inputs))
        per = vectors // self.batch
        block = torch.full((self.batch, per), token)
        if "mm_token_type_ids" in self.names:
            before = self.made.get("mm_token_type_ids", torch.zeros_like(ids))
            kinds = torch.full((self.batch, per), 1 if kind == "image" else 3)
            self.made["mm_token_type_ids"] = torch.cat([before[:, :1], kinds, before[:, 1:]], 1)
        return torch.cat([ids[:, :1], block, ids[:, 1:]], 1)
