"""Runtimes that take a checkpoint by its architecture, and run the activation that the architecture had."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .config import STOCK_KEYS, config_of


class _HardCoded(NamedTuple):
    """What the code of other runtimes has for one model_type.

    Attributes:
        attribute: of the config, which names the activation.
        runs: base of the activation that llama.cpp's graph of this architecture has, whatever the config says.
        refused: whether vLLM's own model raises on any other; where not, it reads the config.
    """

    attribute: str
    runs: str
    refused: bool


# as their sources are in 2026: llama.cpp's src/models, vLLM's vllm/model_executor/models
_HARD_CODED = {
    "llama": _HardCoded("hidden_act", "silu", refused=True),
    "qwen2": _HardCoded("hidden_act", "silu", refused=True),
    "bert": _HardCoded("hidden_act", "gelu", refused=False),
    "gpt2": _HardCoded("activation_function", "gelu", refused=False),
}
_NAMES = {"silu": "SiLU", "gelu": "GELU"}


def runtime_warnings(model: nn.Module) -> tuple[str, ...]:
    """What is to be known of runtimes that would not run the activation that the model's config names."""
    config = config_of(model)
    known = _HARD_CODED.get(getattr(config, "model_type", ""))
    if config is None or known is None:
        return ()
    activation = getattr(config, known.attribute, known.runs)
    base = STOCK_KEYS.get(activation, activation)
    if base == known.runs or (known.runs == "gelu" and base.startswith("gelu")):
        return ()
    name, runs = config.model_type, _NAMES[known.runs]
    said = f"of a {name} checkpoint llama.cpp runs {runs} whatever the config says ({activation})"
    if known.refused:
        return (f"{said}, and vLLM's own {name} takes {runs} alone: neither runs this network. transformers does",)
    return (f"{said}: it does not run this network. transformers does",)
