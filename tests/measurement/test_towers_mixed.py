"""Images beside and among text: which tower a mask belongs to, told by calls, by sizes and by the masks of layers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from support.counted import IMAGE, TEXT, by_part, counted, ids, mask, pixels
from torch import Tensor, nn


@pytest.mark.parametrize("size", [17, 11])
def test_images_beside_text(size: int) -> None:
    """The text's mask is not the image's, whether it has as many positions (16 patches and one) or not."""
    config = tf.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=IMAGE, projection_dim=16)
    batch = {"input_ids": ids(4, size), "attention_mask": mask(4, size, 6), "pixel_values": pixels()}
    seen = by_part(counted(tf.CLIPModel(config), batch))
    assert seen == {"text_model": {(4 * size - 6, 6)}, "vision_model": {(68, 0)}}


def test_images_among_text() -> None:
    """LLaVA: patches have no mask, the language model has its own; of the projector between it cannot be told."""
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT, num_key_value_heads=2),
        vision_config=tf.CLIPVisionConfig(**IMAGE),
        image_token_index=2,
        vision_feature_layer=-1,
    )
    text = ids(4, 22)
    text[:, 2:18] = 2
    batch = {"input_ids": text, "attention_mask": mask(4, 22, 2), "pixel_values": pixels()}
    seen = by_part(counted(tf.LlavaForConditionalGeneration(config), batch), 2)
    assert seen == {
        "model.vision_tower": {(68, 0)},
        "model.multi_modal_projector": {(64, None)},
        "model.language_model": {(86, 2)},
    }


def test_images_and_text_in_one() -> None:
    """ViLT joins both, and its mask too: 9 tokens, 16 patches and one."""
    batch = {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 3), "pixel_values": pixels()}
    seen = counted(tf.ViltModel(tf.ViltConfig(**TEXT, image_size=32, patch_size=8)), batch)
    assert set(seen.values()) == {(4 * 26 - 3, 3)}


class Visual(tf.PreTrainedModel):
    """An image tower that is handed on patches by position, without a mask."""

    config_class = tf.PreTrainedConfig

    def __init__(self, config: tf.PreTrainedConfig) -> None:
        super().__init__(config)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, patches: Tensor) -> Tensor:
        y: Tensor = self.ffn(patches)
        return y


class Both(nn.Module):
    """As many patches as tokens, and a projector between the towers; each example of both is a row of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.embed = Visual(tf.PreTrainedConfig()), nn.Embedding(99, 8)
        self.projector = nn.ModuleList(Visual(tf.PreTrainedConfig()).ffn for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        patches: Tensor = self.visual(pixel_values)
        for layer in self.projector:
            patches = patches + layer(patches)
        y: Tensor = self.embed(input_ids) + patches
        return y


def test_as_many_patches_as_tokens() -> None:
    """The tower of images is told by its call; of the projector it cannot be told, whatever the sizes."""
    batch = {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 4), "pixel_values": torch.randn(4, 9, 8)}
    seen = counted(Both(), batch, hard_coded=True)
    assert seen == {"visual.ffn.1": (36, 0), "projector.0.1": (36, None), "projector.1.1": (36, None)}


class Layer(nn.Module):
    """Attention in name alone: what counts is the mask that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = hidden + self.ffn(hidden)
        return y


class Joint(nn.Module):
    """As Chameleon: images are tokens of the text, and its layers lie in the model that is called with both."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.embed, self.text, self.image, self.additive = nn.Embedding(99, 8), Layer(), Layer(), additive

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        length = input_ids.shape[1]
        every = torch.ones(len(input_ids), 1, length, length).tril().bool()
        seen = (attention_mask[:, None, None] != 0) & every
        if self.additive:
            seen, every = (torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in (seen, every))
        image = self.image(pixel_values, attention_mask=every)
        y: Tensor = self.text(self.embed(input_ids) + image, attention_mask=seen)
        return y


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_layers_that_are_called_with_the_mask_of_the_text(additive: bool, left: bool) -> None:
    """Its keys say whose it is; one of the same size that hides no padding belongs to something else."""
    batch = {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 4, left), "pixel_values": torch.randn(4, 9, 8)}
    seen = counted(Joint(additive), batch, hard_coded=True)
    assert seen == {"text.ffn.1": (32, 4), "image.ffn.1": (36, None)}
