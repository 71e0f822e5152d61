"""Tiny language models with a mixture of experts."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from support import tiny
from support.models import randomized

_MIXTRAL = {**tiny.GATED, "intermediate_size": 40, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1}

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_MIXTRAL, "num_local_experts": 5},
    "olmoe": {**_MIXTRAL, "num_experts": 5},
    "qwen2_moe": {
        **_MIXTRAL,
        "num_experts": 5,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
}


def experts_model(name: str) -> PreTrainedModel:
    """A model of that type, converted, with weights that let its experts matter."""
    return randomized(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXPERTS[name])))
