"""Inputs of models that hear or speak, of which the signature of forward does not tell them."""

from __future__ import annotations

from typing import Any

import torch

from .config_search import find
from .maker import FRAMES, SOUND, TEXT, Maker, vectors_in
from .senses import features


def audio_spectrogram(x: Maker) -> dict[str, Any]:
    return {"input_values": x.normal(x.batch, x.config.max_length, x.config.num_mel_bins)}


def clap(x: Maker) -> dict[str, Any]:
    sound = {"input_features": x.normal(x.batch, 1, 256, 64), "is_longer": torch.zeros(x.batch, 1, dtype=torch.bool)}
    return {**sound, **x.words()} if "input_ids" in x.names else sound


def musicgen(x: Maker) -> dict[str, Any]:
    decoder = x.config.decoder
    ids = x.integers(0, decoder.vocab_size, x.batch * decoder.num_codebooks * decoder.audio_channels, 8)
    words = x.text(config=x.config.text_encoder)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "decoder_input_ids": ids}


def dia(x: Maker) -> dict[str, Any]:
    decoder = x.config.decoder_config
    return {**x.words(), "decoder_input_ids": x.integers(0, decoder.vocab_size, x.batch, 8, decoder.num_channels)}


def speecht5(x: Maker) -> dict[str, Any]:
    hidden = x.normal(x.batch, TEXT, x.config.hidden_size)
    return {"input_values": hidden, "decoder_input_values": x.normal(x.batch, 8, x.config.hidden_size)}


def speech_encoder_decoder(x: Maker) -> dict[str, Any]:
    return {"input_values": x.normal(x.batch, SOUND), "decoder_input_ids": x.text(8, x.config.decoder)}


def pop2piano(x: Maker) -> dict[str, Any]:
    return {"input_features": x.normal(x.batch, TEXT, x.config.d_model), "decoder_input_ids": x.text(8)}


def latents(x: Maker) -> dict[str, Any]:
    name = "latents" if "latents" in x.names else "hidden_states"
    return {name: x.normal(x.batch, x.config.hidden_size, TEXT)}


def codes(x: Maker) -> dict[str, Any]:
    return {"input_ids": x.integers(2, 90, x.batch, TEXT, x.config.num_codebooks + 1)}


def xcodec(x: Maker) -> dict[str, Any]:
    bins = find(x.config, "feature_projection_input_dim")
    return {"input_values": x.normal(x.batch, 1, SOUND), "input_features": x.normal(x.batch, SOUND // 320, bins)}


def qwen_audio(x: Maker) -> dict[str, Any]:
    spectrogram, ids = features(x), x.text()
    ids[:, 1] = find(x.config, "audio_token_id", "audio_token_index")
    mask = torch.ones(x.batch, spectrogram.shape[-1], dtype=torch.long)
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**words, "input_features": spectrogram, "feature_attention_mask": mask}


def realtime(x: Maker) -> dict[str, Any]:
    """A text as long as the features of the sound."""
    spectrogram = features(x)
    encode: Any = x.model.get_audio_features
    with torch.no_grad():
        length = vectors_in(encode(input_features=spectrogram)) // x.batch
    ids = x.text(length)
    return {"input_features": spectrogram, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def waves(x: Maker) -> dict[str, Any]:
    return {"hidden_states": x.normal(x.batch, 1, SOUND)}


def mel(x: Maker) -> dict[str, Any]:
    bins = find(x.config, "input_feat_size")
    return {"audio_mel": x.normal(x.batch, FRAMES, bins), "audio_mel_mask": torch.zeros(x.batch, FRAMES, dtype=torch.bool)}
