"""BLOOM, whose class hard-codes its GELU."""

from __future__ import annotations

import torch
from transformers import BloomConfig, BloomForCausalLM


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
