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

# Where a configuration keeps those of its senses, and the names of the width of a spectrogram.
VISION = (
    "vision_config",
    "vision_encoder_config",
    "image_encoder",
    "vit_config",
    "qformer_config",
    "backbone_config",
    "encoder",
)
AUDIO = (
    "audio_config",
    "audio_encoder_config",
    "speech_config",
    "encoder_config",
    "encoder",
    "acoustic_tokenizer_encoder_config",
)
BINS = ("input_size", "num_mel_bins", "n_mels", "input_feat_size", "feature_projection_input_dim", "input_feat_per_channel")
BINS = (*BINS, "n_mel_bins", "mel_bins", "feature_size", "input_dim", "model_in_channels", "num_mels", "audio_embed_dim")


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
            value = vars(item).get(item.attribute_map.get(name, name))
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
    if getattr(features, "deepstack_features", None) and getattr(features, "pooler_output", None) is None:
        features = features.deepstack_features[0][1]
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

    def size(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Height and width of images."""
        size = find(config, "image_size", "img_size", "crop_size", "input_size", "max_img_size", default=64)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        return int(size[0]), int(size[1])

    def patch(self, config: PreTrainedConfig) -> int:
        patch = find(config, "patch_size", default=16)
        return patch[-1] if isinstance(patch, (list, tuple)) else patch

    def image(self) -> Tensor:
        """Images, or what stands for them: flat patches, tiles of images or frames of a video."""
        vision, names = self.vision, self.names
        channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
        height, width = self.size(vision)
        patch = self.patch(vision)
        batch = self.batch
        if names & {"image_grid_thw", "grid_thw"}:
            name = "grid_thw" if "grid_thw" in names else "image_grid_thw"
            self.made[name] = torch.tensor([[1, GRID, GRID]] * batch)
            flat = channels * find(vision, "temporal_patch_size", default=1) * patch * patch
            for label, module in self.model.named_modules():
                if label.endswith("patch_embedding") and isinstance(module, nn.Linear):
                    flat = module.in_features
            return self.normal(batch * GRID * GRID, flat)
        if "image_grid_hw" in names and "input_ids" in names:
            self.made["image_grid_hw"] = torch.tensor([[GRID, GRID]] * batch)
            return self.normal(batch * GRID * GRID, channels * patch * patch)
        if "target_sizes" in names:
            self.made["target_sizes"] = torch.tensor([[GRID, GRID]] * batch)
            return self.normal(1, channels, patch, batch * GRID * GRID * patch)
        if "spatial_shapes" in names:
            self.made["spatial_shapes"] = torch.tensor([[GRID, GRID]] * batch)
            self.made["pixel_attention_mask"] = torch.ones(batch, GRID * GRID, dtype=torch.long)
            return self.normal(batch, GRID * GRID, channels * patch * patch)
        if names & {"image_position_ids", "pixel_position_ids"}:
            name = "pixel_position_ids" if "pixel_position_ids" in names else "image_position_ids"
            steps, patch = torch.arange(GRID), getattr(vision, "model_patch_size", patch)
            self.made[name] = torch.cartesian_prod(steps, steps).flip(-1).repeat(batch, 1, 1)
            return torch.rand(batch, GRID * GRID, channels * patch * patch, generator=self.generator)
        if "image_sizes" in names and (
            vision.model_type == "pixtral" or find(self.config, "image_grid_pinpoints", "vq_config")
        ):
            self.made["image_sizes"] = torch.tensor([[height, width]] * batch)
            if find(self.config, "image_grid_pinpoints"):
                return self.normal(batch, 2, channels, height, width)
        if "pixel_attention_mask" in names or self.config.model_type == "colmodernvbert":
            if "tile_fine_mask" in names:
                self.made["pixel_attention_mask"] = torch.ones(batch, 1, dtype=torch.bool)
            return self.normal(batch, 1, channels, height, width)
        frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
        if frames:
            return self.normal(batch, frames, channels, height, width)
        return self.normal(batch, channels, height, width)

    def features(self) -> Tensor:
        """A spectrogram: its bins come first where a convolution takes them as its channels."""
        bins = find(self.audio, *BINS, default=80) * find(self.audio, "num_stacked_frames", default=1)
        if channels := find(self.audio, "subsampling_conv_channels"):
            bins = channels[0] if isinstance(channels, (list, tuple)) else bins
        if window := find(self.audio, "n_window"):
            return self.normal(self.batch, bins, 2 * window)
        frames = FRAMES
        for name, module in self.model.named_modules():
            if name.endswith("input_linear"):
                bins = module.in_features
            if name.endswith("conv1") and isinstance(module, nn.Conv1d) and module.in_channels == bins:
                positions = find(self.audio, "max_source_positions")
                return self.normal(self.batch, bins, 2 * positions if positions else frames)
        return self.normal(self.batch, frames, bins)

    def sound(self) -> Tensor:
        """A sound, with its channels where a model names them."""
        if self.names & {"padding_mask", "audio_codes", "n_quantizers", "sample"}:
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
        for inner in ("base_model", "encoder"):
            encode = encode or getattr(getattr(self.model, inner, None), f"get_{kind}_features", None)
        if token is None or encode is None:
            return ids
        takes = inspect.signature(encode).parameters
        if "vision_start_token_id" in vars(self.config) and kind == "image":
            ids[:, 0] = self.config.vision_start_token_id
        with torch.no_grad():
            rows = _rows(encode(**{name: value for name, value in self.made.items() if name in takes}))
        per = rows // self.batch
        block = torch.full((self.batch, per), token)
        if "mm_token_type_ids" in self.names:
            before = self.made.get("mm_token_type_ids", torch.zeros_like(ids))
            kinds = torch.full((self.batch, per), 1 if kind == "image" else 3)
            self.made["mm_token_type_ids"] = torch.cat([before[:, :1], kinds, before[:, 1:]], 1)
        return torch.cat([ids[:, :1], block, ids[:, 1:]], 1)

    def words(self) -> dict[str, Any]:
        """A text and its mask."""
        ids = self.text()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

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
        absent = {name for name in ("vision_config", "audio_config") if getattr(config, name, ...) is None}
        if "pixel_values" in names and "vision_config" not in absent:
            made["pixel_values"] = self.image()
        elif "hidden_states" in names and "grid_thw" in names:
            made["hidden_states"] = self.image()
        elif "pixel_values_videos" in names and "input_ids" not in names:
            made["pixel_values_videos"] = self.image()
        if "input_features" in names and "audio_config" not in absent:
            made["input_features"] = self.features()
            if "input_features_mask" in names and not config.model_type.startswith("granite_speech"):
                frames = made["input_features"].shape[-1] if find(self.audio, "n_window") else FRAMES
                made["input_features_mask"] = torch.ones(
                    batch, frames, dtype=torch.bool if config.model_type.startswith("gemma4") else torch.long
                )
            if "feature_attention_mask" in names:
                made["feature_attention_mask"] = torch.ones(batch, made["input_features"].shape[-1], dtype=torch.long)
        if "input_values" in names and "decoder_input_values" not in names:
            made["input_values"] = self.sound()
        if names >= {"padding_mask", "input_ids"} and made.keys() & {"input_values", "input_features"}:
            made["padding_mask"] = torch.ones(batch, SOUND, dtype=torch.bool)
        if "merge_sizes" in names or "image_merge_sizes" in names:
            made["merge_sizes" if "merge_sizes" in names else "image_merge_sizes"] = torch.ones(batch, dtype=torch.long)
        if "input_points" in names:
            made["input_points"] = torch.rand(batch, 1, 2, 2, generator=self.generator) * 32
            made["input_labels"] = torch.ones(batch, 1, 2, dtype=torch.long)
        if "input_masks" in names:
            side = 4 * find(config.prompt_encoder_config, "image_size") // find(config.prompt_encoder_config, "patch_size")
            made["input_masks"] = self.normal(batch, 1, side, side)
        if "prompt_depth" in names:
            made["prompt_depth"] = torch.rand(batch, 1, *self.size(self.vision), generator=self.generator)
        if "chunk_sample_lengths" in names:
            made["chunk_sample_lengths"] = torch.full((batch,), FRAMES * find(self.audio, "hop_length"))
        if "high_res_pixel_values" in names:
            made["high_res_pixel_values"] = self.normal(batch, 3, *self.size(config.high_res_vision_config))
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
        if names >= {"input_ids", "decoder_input_ids", "input_features"}:
            del made["input_ids"], made["attention_mask"]  # a text or a sound, not both
        if "decoder_input_ids" in names:
            decoder = getattr(config, "decoder", None)
            made["decoder_input_ids"] = self.text(8, decoder if isinstance(decoder, PreTrainedConfig) else None)
        if "bbox" in names:
            corners = self.integers(0, 50, batch, made["input_ids"].shape[1], 2)
            made["bbox"] = torch.cat([corners, corners + 10], -1)
        return made


def _audio_spectrogram(x: _Inputs) -> dict[str, Any]:
    return {"input_values": x.normal(x.batch, x.config.max_length, x.config.num_mel_bins)}


def _clap(x: _Inputs) -> dict[str, Any]:
    sound = {"input_features": x.normal(x.batch, 1, 256, 64), "is_longer": torch.zeros(x.batch, 1, dtype=torch.bool)}
    return {**sound, **x.words()} if "input_ids" in x.names else sound


def _decision(x: _Inputs) -> dict[str, Any]:
    b, t, c = x.batch, TEXT, x.config
    made = {"states": x.normal(b, t, c.state_dim), "actions": x.normal(b, t, c.act_dim), "rewards": x.normal(b, t, 1)}
    steps = torch.arange(t).expand(b, -1)
    return {**made, "returns_to_go": x.normal(b, t, 1), "timesteps": steps, "attention_mask": torch.ones(b, t)}


def _lxmert(x: _Inputs) -> dict[str, Any]:
    visual = {"visual_feats": x.normal(x.batch, 5, x.config.visual_feat_dim), "visual_pos": x.normal(x.batch, 5, 4)}
    return {**x.words(), **visual}


def _visual_bert(x: _Inputs) -> dict[str, Any]:
    return {**x.words(), "visual_embeds": x.normal(x.batch, 5, x.config.visual_embedding_dim)}


def _pair(x: _Inputs) -> dict[str, Any]:
    channels = 1 if x.config.model_type == "efficientloftr" else 3
    return {"pixel_values": torch.rand(x.batch, 2, channels, 64, 64, generator=x.generator)}


def _seggpt(x: _Inputs) -> dict[str, Any]:
    height, width = x.config.image_size
    return {
        name: x.normal(x.batch, 3, height // 2, width) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    }


def _perceiver(x: _Inputs) -> dict[str, Any]:
    return {"inputs": x.normal(x.batch, TEXT, x.config.d_model)}


def _patches(x: _Inputs) -> dict[str, Any]:
    size = find(x.vision, "patch_size")
    flat = find(x.vision, "patch_embed_hidden_size") if size is None else 3 * size * size
    rows = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1)).expand(x.batch, -1, -1)
    patches = torch.cat([rows, x.normal(x.batch, GRID * GRID, flat)], -1)
    made = {"flattened_patches": patches, "attention_mask": torch.ones(x.batch, GRID * GRID)}
    if "decoder_input_ids" in x.names:
        made["decoder_input_ids"] = x.text(8)
    return made


def _kosmos(x: _Inputs) -> dict[str, Any]:
    """Tokens of which the second to the last but one are an image's."""
    latents = x.config.latent_query_num
    ids = x.text(latents + 6)
    mask = torch.zeros_like(ids)
    mask[:, 1 : 1 + latents] = 1
    made = (
        {"pixel_values": x.image()} if "pixel_values" in x.names else {"flattened_patches": _patches(x)["flattened_patches"]}
    )
    return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": mask}


def _oneformer(x: _Inputs) -> dict[str, Any]:
    return {"pixel_values": x.image(), "task_inputs": x.integers(2, 100, x.batch, x.config.task_seq_len)}


def _omdet(x: _Inputs) -> dict[str, Any]:
    classes, tasks = x.text(8).repeat(2, 1), x.text(8)
    made = {"pixel_values": x.image(), "classes_input_ids": classes, "classes_attention_mask": torch.ones_like(classes)}
    made |= {"tasks_input_ids": tasks, "tasks_attention_mask": torch.ones_like(tasks)}
    return {**made, "classes_structure": torch.full((x.batch,), 2)}


def _instruct(x: _Inputs) -> dict[str, Any]:
    made = x.all()
    ids = x.text(8, x.config.qformer_config)
    return {**made, "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _qformer(x: _Inputs) -> dict[str, Any]:
    hidden = x.normal(x.batch, 16, x.config.encoder_hidden_size)
    return {"query_embeds": x.normal(x.batch, 8, x.config.hidden_size), "encoder_hidden_states": hidden}


def _idefics(x: _Inputs) -> dict[str, Any]:
    size = x.config.vision_config.image_size
    words = x.words()
    mask = torch.ones(x.batch, words["input_ids"].shape[1], 1, dtype=torch.long)
    return {**words, "pixel_values": x.normal(x.batch, 1, 3, size, size), "image_attention_mask": mask}


def _mllama(x: _Inputs) -> dict[str, Any]:
    vision, words = x.config.vision_config, x.words()
    tiles, size = vision.max_num_tiles, vision.image_size
    words["pixel_values"] = x.normal(x.batch, 1, tiles, 3, size, size)
    words["aspect_ratio_ids"] = torch.ones(x.batch, 1, dtype=torch.long)
    words["aspect_ratio_mask"] = torch.ones(x.batch, 1, tiles, dtype=torch.long)
    words["cross_attention_mask"] = torch.ones(x.batch, words["input_ids"].shape[1], 1, tiles, dtype=torch.long)
    return words


def _fuyu(x: _Inputs) -> dict[str, Any]:
    x.made["pixel_values"] = x.normal(x.batch, 4, 3 * x.config.patch_size**2)
    x.made["input_ids"] = x.place(x.text(), "image")
    return x.made


def _musicgen(x: _Inputs) -> dict[str, Any]:
    decoder = x.config.decoder
    ids = x.integers(0, decoder.vocab_size, x.batch * decoder.num_codebooks * decoder.audio_channels, 8)
    words = x.text(config=x.config.text_encoder)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "decoder_input_ids": ids}


def _dia(x: _Inputs) -> dict[str, Any]:
    decoder = x.config.decoder_config
    return {**x.words(), "decoder_input_ids": x.integers(0, decoder.vocab_size, x.batch, 8, decoder.num_channels)}


def _speecht5(x: _Inputs) -> dict[str, Any]:
    hidden = x.normal(x.batch, TEXT, x.config.hidden_size)
    return {"input_values": hidden, "decoder_input_values": x.normal(x.batch, 8, x.config.hidden_size)}


def _speech_encoder_decoder(x: _Inputs) -> dict[str, Any]:
    return {"input_values": x.normal(x.batch, SOUND), "decoder_input_ids": x.text(8, x.config.decoder)}


def _pop2piano(x: _Inputs) -> dict[str, Any]:
    return {"input_features": x.normal(x.batch, TEXT, x.config.d_model), "decoder_input_ids": x.text(8)}


def _embeddings(x: _Inputs) -> dict[str, Any]:
    return {"inputs_embeds": x.normal(x.batch, TEXT, x.config.hidden_size)}


def _latents(x: _Inputs) -> dict[str, Any]:
    name = "latents" if "latents" in x.names else "hidden_states"
    return {name: x.normal(x.batch, x.config.hidden_size, TEXT)}


def _timesfm(x: _Inputs) -> dict[str, Any]:
    length = x.config.context_length
    made = {"past_values": x.normal(x.batch, length), "past_values_padding": torch.zeros(x.batch, length)}
    return {**made, "freq": torch.zeros(x.batch, 1, dtype=torch.long)} if "freq" in x.names else made


def _frames(x: _Inputs) -> dict[str, Any]:
    height, width = x.size(x.config)
    frames = find(x.config, "num_frames", "frames_per_clip", default=2)
    name = "pixel_values_videos" if "pixel_values_videos" in x.names else "pixel_values"
    video = {name: x.normal(x.batch, frames, 3, height, width)}
    return {**video, **x.words()} if "input_ids" in x.names else video


def _jev(x: _Inputs) -> dict[str, Any]:
    made = {"input_ids": x.text()[:1], "marks": torch.tensor([[4, 8]]), "num_options": torch.tensor([[2, 2]])}
    return {**made, "question_type_ids": torch.tensor([[0, 0]])}


def _pi0(x: _Inputs) -> dict[str, Any]:
    size = x.config.vlm_config.vision_config.image_size
    x.made["pixel_values"] = x.normal(x.batch, 1, 3, size, size)
    x.made["pixel_attention_mask"] = torch.ones(x.batch, 1, dtype=torch.bool)
    tokens = (size // x.config.vlm_config.vision_config.patch_size) ** 2
    ids = x.text()
    image = torch.full((x.batch, tokens), x.config.vlm_config.image_token_id)
    x.made["input_ids"] = torch.cat([image, ids], 1)
    x.made["attention_mask"] = torch.ones_like(x.made["input_ids"])
    return {**x.made, "action_embeds": x.normal(x.batch, 4, x.config.dit_config.hidden_size)}


def _words(x: _Inputs) -> dict[str, Any]:
    return x.words()


def _inkling(x: _Inputs) -> dict[str, Any]:
    side = x.patch(x.vision) * find(x.vision, "spatial_merge_size")
    x.made |= {"image_grid_thw": torch.tensor([[1, 2, 2]] * x.batch), "pixel_values": x.normal(x.batch * 4, side, side, 3)}
    if "input_ids" in x.names:
        x.made["input_ids"] = x.place(x.text(), "image")
    return x.made


def _neomme(x: _Inputs) -> dict[str, Any]:
    x.made["pixel_values"] = x.normal(x.batch * 4, 3 * x.config.patch_size**2)
    return {**x.made, "input_ids": x.place(x.text(), "image")}


def _drafts(x: _Inputs) -> dict[str, Any]:
    width = x.config.hidden_size
    context = x.normal(x.batch, TEXT, width * len(x.config.target_layer_ids))
    return {"noise_embeds": x.normal(x.batch, x.config.block_size, width), "context_hidden_states": context}


def _large(x: _Inputs) -> dict[str, Any]:
    side = 224 if x.config.model_type == "depth_pro" else 96
    return {"pixel_values": x.normal(x.batch, 3, side, side)}


def _one_video(x: _Inputs) -> dict[str, Any]:
    x.batch = 1  # it takes no more
    return _frames(x)


def _codes(x: _Inputs) -> dict[str, Any]:
    return {"input_ids": x.integers(2, 90, x.batch, TEXT, x.config.num_codebooks + 1)}


def _xcodec(x: _Inputs) -> dict[str, Any]:
    bins = find(x.config, "feature_projection_input_dim")
    return {"input_values": x.normal(x.batch, 1, SOUND), "input_features": x.normal(x.batch, SOUND // 320, bins)}


def _conditioned(x: _Inputs) -> dict[str, Any]:
    return {**_embeddings(x), "t_cond": x.normal(1, x.config.hidden_size)}


def _inkling_mm(x: _Inputs) -> dict[str, Any]:
    """Images of a few frames, their channels last."""
    vision = x.config.vision_config
    x.made["pixel_values"] = x.normal(x.batch * 2, vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3)
    return {**x.made, "input_ids": x.place(x.text(), "image")}


def _square_patches(x: _Inputs) -> dict[str, Any]:
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


def _colqwen(x: _Inputs) -> dict[str, Any]:
    made = x.all()
    made["pixel_values"] = made["pixel_values"].view(x.batch, GRID * GRID, -1)
    image = torch.full((x.batch, GRID), find(x.config, "image_token_id"))
    ids = torch.cat([image, x.text()], 1)
    return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _instruct_video(x: _Inputs) -> dict[str, Any]:
    made = _instruct(x)
    made["pixel_values"] = made["pixel_values"].unsqueeze(1).repeat(1, 4, 1, 1, 1)
    return made


def _qwen_audio(x: _Inputs) -> dict[str, Any]:
    features, ids = x.features(), x.text()
    ids[:, 1] = find(x.config, "audio_token_id", "audio_token_index")
    mask = torch.ones(x.batch, features.shape[-1], dtype=torch.long)
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**words, "input_features": features, "feature_attention_mask": mask}


def _realtime(x: _Inputs) -> dict[str, Any]:
    """A text as long as the features of the sound."""
    features = x.features()
    with torch.no_grad():
        length = _rows(x.model.get_audio_features(input_features=features)) // x.batch
    ids = x.text(length)
    return {"input_features": features, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _waves(x: _Inputs) -> dict[str, Any]:
    return {"hidden_states": x.normal(x.batch, 1, SOUND)}


def _mel(x: _Inputs) -> dict[str, Any]:
    bins = find(x.config, "input_feat_size")
    return {"audio_mel": x.normal(x.batch, FRAMES, bins), "audio_mel_mask": torch.zeros(x.batch, FRAMES, dtype=torch.bool)}


# The inputs of those whose signature does not tell them.
SPECIAL: dict[str, Callable[[_Inputs], dict[str, Any]]] = {
    "audio-spectrogram-transformer": _audio_spectrogram,
    "blip_2_qformer": _qformer,
    "clap": _clap,
    "clap_audio_model": _clap,
    "colqwen2": _colqwen,
    "csm": _words,
    "decision_transformer": _decision,
    "deepseek_ocr2": _words,
    "depth_pro": _large,
    "dia": _dia,
    "efficientloftr": _pair,
    "fuyu": _fuyu,
    "gemma3n_audio": _mel,
    "glm_image": _words,
    "idefics": _idefics,
    "inkling2": _inkling,
    "inkling2_vision": _inkling,
    "inkling_mm_model": _inkling_mm,
    "instructblip": _instruct,
    "instructblipvideo": _instruct_video,
    "jev": _jev,
    "kimi_k25": _square_patches,
    "kimi_k25_vision": _square_patches,
    "kosmos-2": _kosmos,
    "kosmos-2.5": _kosmos,
    "kyutai_speech_to_text": _codes,
    "lightglue": _pair,
    "lxmert": _lxmert,
    "mimi_decoder": _latents,
    "mllama": _mllama,
    "molmo2": _words,
    "muse_glimmer_assistant": _drafts,
    "musicflamingo": _words,
    "musicgen": _musicgen,
    "musicgen_melody": _musicgen,
    "nemotron3_5_transcribe_word_timestamp": _embeddings,
    "neomme": _neomme,
    "omdet-turbo": _omdet,
    "oneformer": _oneformer,
    "paddleocr_vl": _square_patches,
    "perceiver": _perceiver,
    "pi0": _pi0,
    "pix2struct": _patches,
    "pocket_tts_audio_tokenizer_decoder": _latents,
    "pop2piano": _pop2piano,
    "pp_ocrv5_mobile_rec": _large,
    "qwen2_audio": _qwen_audio,
    "seggpt": _seggpt,
    "speech-encoder-decoder": _speech_encoder_decoder,
    "speecht5": _speecht5,
    "superglue": _pair,
    "timesfm": _timesfm,
    "tvp": _one_video,
    "unlimited_ocr": _words,
    "vibevoice_acoustic_tokenizer_decoder": _latents,
    "vibevoice_acoustic_tokenizer_encoder": _waves,
    "videomt": _frames,
    "videoprism": _frames,
    "visual_bert": _visual_bert,
    "voxtral_realtime": _realtime,
    "voxtral_realtime_text": _conditioned,
    "xcodec2": _xcodec,
}


def example_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Inputs that forward takes, the same ones each time.

    Args:
        model: a model of tiny_model.
        batch_size: how many texts, images or sounds.
    """
    inputs = _Inputs(model, batch_size)
    made = SPECIAL[model.config.model_type](inputs) if model.config.model_type in SPECIAL else inputs.all()
    name = type(model).__name__
    if name.endswith("ForMultipleChoice"):
        made = {name: value.unsqueeze(1).repeat(1, 2, *[1] * (value.ndim - 1)) for name, value in made.items()}
    if name.endswith(("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")):
        made.pop("decoder_input_ids", None)  # it is the input, shifted
    return made
