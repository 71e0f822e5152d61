"""Inputs of models that see, of which the signature of forward does not tell them."""

from __future__ import annotations

from typing import Any

import torch

from .config_search import find
from .maker import GRID, Maker
from .senses import image
from .signature import all_inputs


def lxmert(x: Maker) -> dict[str, Any]:
    visual = {"visual_feats": x.normal(x.batch, 5, x.config.visual_feat_dim), "visual_pos": x.normal(x.batch, 5, 4)}
    return {**x.words(), **visual}


def visual_bert(x: Maker) -> dict[str, Any]:
    return {**x.words(), "visual_embeds": x.normal(x.batch, 5, x.config.visual_embedding_dim)}


def pair(x: Maker) -> dict[str, Any]:
    channels = 1 if x.config.model_type == "efficientloftr" else 3
    return {"pixel_values": torch.rand(x.batch, 2, channels, 64, 64, generator=x.generator)}


def seggpt(x: Maker) -> dict[str, Any]:
    height, width = x.config.image_size
    return {
        name: x.normal(x.batch, 3, height // 2, width) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    }


def patches(x: Maker) -> dict[str, Any]:
    size = find(x.vision, "patch_size")
    flat = find(x.vision, "patch_embed_hidden_size") if size is None else 3 * size * size
    rows = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1)).expand(x.batch, -1, -1)
    patches = torch.cat([rows, x.normal(x.batch, GRID * GRID, flat)], -1)
    made = {"flattened_patches": patches, "attention_mask": torch.ones(x.batch, GRID * GRID)}
    if "decoder_input_ids" in x.names:
        made["decoder_input_ids"] = x.text(8)
    return made


def kosmos(x: Maker) -> dict[str, Any]:
    """Tokens of which the second to the last but one are an image's."""
    latents = x.config.latent_query_num
    ids = x.text(latents + 6)
    mask = torch.zeros_like(ids)
    mask[:, 1 : 1 + latents] = 1
    made = (
        {"pixel_values": image(x)} if "pixel_values" in x.names else {"flattened_patches": patches(x)["flattened_patches"]}
    )
    return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": mask}


def oneformer(x: Maker) -> dict[str, Any]:
    return {"pixel_values": image(x), "task_inputs": x.integers(2, 100, x.batch, x.config.task_seq_len)}


def omdet(x: Maker) -> dict[str, Any]:
    classes, tasks = x.text(8).repeat(2, 1), x.text(8)
    made = {"pixel_values": image(x), "classes_input_ids": classes, "classes_attention_mask": torch.ones_like(classes)}
    made |= {"tasks_input_ids": tasks, "tasks_attention_mask": torch.ones_like(tasks)}
    return {**made, "classes_structure": torch.full((x.batch,), 2)}


def instruct(x: Maker) -> dict[str, Any]:
    made = all_inputs(x)
    ids = x.text(8, x.config.qformer_config)
    return {**made, "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def idefics(x: Maker) -> dict[str, Any]:
    size = x.config.vision_config.image_size
    words = x.words()
    mask = torch.ones(x.batch, words["input_ids"].shape[1], 1, dtype=torch.long)
    return {**words, "pixel_values": x.normal(x.batch, 1, 3, size, size), "image_attention_mask": mask}


def mllama(x: Maker) -> dict[str, Any]:
    vision, words = x.config.vision_config, x.words()
    tiles, size = vision.max_num_tiles, vision.image_size
    words["pixel_values"] = x.normal(x.batch, 1, tiles, 3, size, size)
    words["aspect_ratio_ids"] = torch.ones(x.batch, 1, dtype=torch.long)
    words["aspect_ratio_mask"] = torch.ones(x.batch, 1, tiles, dtype=torch.long)
    words["cross_attention_mask"] = torch.ones(x.batch, words["input_ids"].shape[1], 1, tiles, dtype=torch.long)
    return words


def fuyu(x: Maker) -> dict[str, Any]:
    x.made["pixel_values"] = x.normal(x.batch, 4, 3 * x.config.patch_size**2)
    x.made["input_ids"] = x.place(x.text(), "image")
    return x.made


def frames(x: Maker) -> dict[str, Any]:
    height, width = x.size(x.config)
    frames = find(x.config, "num_frames", "frames_per_clip", default=2)
    name = "pixel_values_videos" if "pixel_values_videos" in x.names else "pixel_values"
    video = {name: x.normal(x.batch, frames, 3, height, width)}
    return {**video, **x.words()} if "input_ids" in x.names else video


def pi0(x: Maker) -> dict[str, Any]:
    size = x.config.vlm_config.vision_config.image_size
    x.made["pixel_values"] = x.normal(x.batch, 1, 3, size, size)
    x.made["pixel_attention_mask"] = torch.ones(x.batch, 1, dtype=torch.bool)
    tokens = (size // x.config.vlm_config.vision_config.patch_size) ** 2
    ids = x.text()
    image = torch.full((x.batch, tokens), x.config.vlm_config.image_token_id)
    x.made["input_ids"] = torch.cat([image, ids], 1)
    x.made["attention_mask"] = torch.ones_like(x.made["input_ids"])
    return {**x.made, "action_embeds": x.normal(x.batch, 4, x.config.dit_config.hidden_size)}


def inkling(x: Maker) -> dict[str, Any]:
    side = x.patch(x.vision) * find(x.vision, "spatial_merge_size")
    x.made |= {"image_grid_thw": torch.tensor([[1, 2, 2]] * x.batch), "pixel_values": x.normal(x.batch * 4, side, side, 3)}
    if "input_ids" in x.names:
        x.made["input_ids"] = x.place(x.text(), "image")
    return x.made


def neomme(x: Maker) -> dict[str, Any]:
    x.made["pixel_values"] = x.normal(x.batch * 4, 3 * x.config.patch_size**2)
    return {**x.made, "input_ids": x.place(x.text(), "image")}


def large(x: Maker) -> dict[str, Any]:
    side = 224 if x.config.model_type == "depth_pro" else 96
    return {"pixel_values": x.normal(x.batch, 3, side, side)}


def one_video(x: Maker) -> dict[str, Any]:
    x.batch = 1  # it takes no more
    return frames(x)


def inkling_mm(x: Maker) -> dict[str, Any]:
    """Images of a few frames, their channels last."""
    vision = x.config.vision_config
    x.made["pixel_values"] = x.normal(x.batch * 2, vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3)
    return {**x.made, "input_ids": x.place(x.text(), "image")}


def square_patches(x: Maker) -> dict[str, Any]:
    """Patches that keep their height and width, in a batch of one where the images come in one."""
    patch = x.patch(x.vision)
    x.made["grid_thw" if "grid_thw" in x.names else "image_grid_thw"] = torch.tensor([[1, GRID, GRID]] * x.batch)
    x.made["pixel_values"] = x.normal(x.batch * GRID * GRID, 3, patch, patch)
    if "input_ids" in x.names:
        ids = x.text()
        if "mm_token_type_ids" in x.names:
            x.made["mm_token_type_ids"] = torch.zeros_like(ids)
        x.made["input_ids"] = x.place(ids, "image")
        x.made["attention_mask"] = torch.ones_like(x.made["input_ids"])
    return x.made


def colqwen(x: Maker) -> dict[str, Any]:
    made = all_inputs(x)
    made["pixel_values"] = made["pixel_values"].view(x.batch, GRID * GRID, -1)
    image = torch.full((x.batch, GRID), find(x.config, "image_token_id"))
    ids = torch.cat([image, x.text()], 1)
    return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def instruct_video(x: Maker) -> dict[str, Any]:
    made = instruct(x)
    made["pixel_values"] = made["pixel_values"].unsqueeze(1).repeat(1, 4, 1, 1, 1)
    return made
