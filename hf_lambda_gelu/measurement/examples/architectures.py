"""Inputs by the architecture where the signature of forward does not tell them, else by the signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from . import special_images as images
from . import special_others as others
from . import special_sounds as sounds
from .maker import Maker
from .signature import all_inputs

# By model type, as configs name it.
SPECIAL: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "audio-spectrogram-transformer": sounds.audio_spectrogram,
    "blip_2_qformer": others.qformer,
    "clap": sounds.clap,
    "clap_audio_model": sounds.clap,
    "colqwen2": images.colqwen,
    "csm": others.words,
    "decision_transformer": others.decision,
    "deepseek_ocr2": others.words,
    "depth_pro": images.large,
    "dia": sounds.dia,
    "efficientloftr": images.pair,
    "fuyu": images.fuyu,
    "gemma3n_audio": sounds.mel,
    "glm_image": others.words,
    "idefics": images.idefics,
    "inkling2": images.inkling,
    "inkling2_vision": images.inkling,
    "inkling_mm_model": images.inkling_mm,
    "instructblip": images.instruct,
    "instructblipvideo": images.instruct_video,
    "jev": others.jev,
    "kimi_k25": images.square_patches,
    "kimi_k25_vision": images.square_patches,
    "kosmos-2": images.kosmos,
    "kosmos-2.5": images.kosmos,
    "kyutai_speech_to_text": sounds.codes,
    "lightglue": images.pair,
    "lxmert": images.lxmert,
    "mimi_decoder": sounds.latents,
    "mllama": images.mllama,
    "molmo2": others.words,
    "muse_glimmer_assistant": others.drafts,
    "musicflamingo": others.words,
    "musicgen": sounds.musicgen,
    "musicgen_melody": sounds.musicgen,
    "nemotron3_5_transcribe_word_timestamp": others.embeddings,
    "neomme": images.neomme,
    "omdet-turbo": images.omdet,
    "oneformer": images.oneformer,
    "paddleocr_vl": images.square_patches,
    "perceiver": others.perceiver,
    "pi0": images.pi0,
    "pix2struct": images.patches,
    "pocket_tts_audio_tokenizer_decoder": sounds.latents,
    "pop2piano": sounds.pop2piano,
    "pp_ocrv5_mobile_rec": images.large,
    "qwen2_audio": sounds.qwen_audio,
    "seggpt": images.seggpt,
    "speech-encoder-decoder": sounds.speech_encoder_decoder,
    "speecht5": sounds.speecht5,
    "superglue": images.pair,
    "timesfm": others.timesfm,
    "tvp": images.one_video,
    "unlimited_ocr": others.words,
    "vibevoice_acoustic_tokenizer_decoder": sounds.latents,
    "vibevoice_acoustic_tokenizer_encoder": sounds.waves,
    "videomt": images.frames,
    "videoprism": images.frames,
    "visual_bert": images.visual_bert,
    "voxtral_realtime": sounds.realtime,
    "voxtral_realtime_text": others.conditioned,
    "xcodec2": sounds.xcodec,
}


def inputs_by_architecture(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Inputs by the architecture, or else by forward's signature, the same ones each time; on the CPU, in fp32.

    Args:
        batch_size: how many texts, images or sounds; a few architectures take one only.
    """
    inputs = Maker(model, batch_size)
    made = SPECIAL[model.config.model_type](inputs) if model.config.model_type in SPECIAL else all_inputs(inputs)
    name = type(model).__name__
    if name.endswith("ForMultipleChoice"):
        made = {name: value.unsqueeze(1).repeat(1, 2, *[1] * (value.ndim - 1)) for name, value in made.items()}
    if name.endswith(("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")):
        made.pop("decoder_input_ids", None)  # it is the input, shifted
    return made
