"""λ-GELU and ReLU models: the tiny ones of `support.tiny`, and any other with weights that let its activations matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, RoFormerConfig, RoFormerForSequenceClassification

import hf_lambda_gelu as hlg
from support import tiny


def converted(
    name: str, hardness: float = 1.0, step: float = 0.0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A tiny model with λ-GELU: λ = `hardness` at the first site, `step` more at each of the next."""
    model = tiny.build(name, **overrides)
    hlg.convert(model)
    tiny.set_hardness(model, hardness, step)
    return model.to(dtype)


def relu_model(name: str = "bert", value: float = 160.0, step: float = 0.0) -> PreTrainedModel:
    """A tiny model that has gone all the way."""
    model = converted(name, value, step)
    hlg.relu_ize(model, force=True)
    return model


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """With weights large enough for the activations to matter, converted, in eval mode."""
    torch.manual_seed(0)
    hlg.convert(tiny.enliven(model))
    return model.eval()


def hardened(name: str, value: float = 160.0, step: float = 0.0) -> PreTrainedModel:
    """A converted model whose gates are hard enough for `relu_ize`, unless the value says otherwise."""
    return converted(name, value, step)


def stock_relu(name: str, weights: PreTrainedModel) -> PreTrainedModel:
    """The network that stock transformers builds when the config says relu, with these weights."""
    model = tiny.build(name, seed=1, **tiny.relu_overrides(name))
    state = {key: tensor for key, tensor in weights.state_dict().items() if not key.endswith("unclipped_hardness")}
    model.load_state_dict(state)
    return model


def roformer() -> PreTrainedModel:
    """A converted and hardened model whose classifier looks `hidden_act` up inside forward."""
    torch.manual_seed(0)
    model = RoFormerForSequenceClassification(RoFormerConfig(**tiny.MODELS["bert"][2])).eval()
    hlg.convert(model)
    tiny.set_hardness(model, 160.0)
    return model
