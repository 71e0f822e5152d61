"""`convert` where nothing is to be converted: what was got and what to do is said, and the model is as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.models import converted
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    FlaubertConfig,
    FlaubertModel,
    OpenAIGPTConfig,
    OpenAIGPTModel,
    PreTrainedModel,
    XLMConfig,
    XLMModel,
    activations,
)

import hf_lambda_gelu as hlg

TEXT = tiny.MODELS["bert"][2]
SHARED = {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "gelu_activation": True}  # one module for all
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}


class Picky(BertModel):
    """A model whose construction fails with any activation but GELU."""

    def __init__(self, config: BertConfig) -> None:
        if config.hidden_act != "gelu":
            raise RuntimeError("only GELU here")
        super().__init__(config)


def swapped(new: nn.Module) -> PreTrainedModel:
    """BERT with one activation replaced behind the config's back."""
    model = tiny.build("bert")
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = new
    return model


def edited(value: str) -> PreTrainedModel:
    """BERT with its config edited after the fact."""
    model = tiny.build("bert")
    model.config.hidden_act = value
    return model


def converted_on_meta() -> PreTrainedModel:
    """A model without storage, converted."""
    with torch.device("meta"):
        model = BertModel(BertConfig(**TEXT))
    hlg.convert(model)
    return model


# case → (model, arguments, error, message)
ERRORS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, float], type[Exception], str]] = {
    "twice": (lambda: converted("bert"), {}, hlg.ConversionError, r"converted already: it has 3 λ-GELU modules"),
    "twice on meta": (converted_on_meta, {}, hlg.ConversionError, r"converted already: it has 2"),
    "relu": (
        lambda: tiny.build("bert", hidden_act="relu"),
        {},
        hlg.ConversionError,
        r"saw 3 × ReLU; .* ReLU network already",
    ),
    "tanh": (lambda: tiny.build("gpt2", activation_function="tanh"), {}, hlg.ConversionError, r"GPT2LM.*: saw 2 × Tanh$"),
    "one is ReLU": (
        lambda: swapped(nn.ReLU()),
        {},
        hlg.ConversionError,
        r"config\.hidden_act = 'gelu' governs bert\.encoder\.layer\.1\.intermediate\.intermediate_act_fn, which is ReLU",
    ),
    "one is tanh-GELU": (lambda: swapped(nn.GELU(approximate="tanh")), {}, hlg.ConversionError, r"disagree.*which is GELU"),
    "config edited": (lambda: edited("gelu_new"), {}, hlg.ConversionError, r"'gelu_new' governs .* which is GELUActivation"),
    "config says relu": (lambda: edited("relu"), {}, hlg.ConversionError, r"saw 3 × GELUActivation"),
    "config says lambda_gelu": (lambda: edited("lambda_gelu"), {}, hlg.ConversionError, r"saw 3 × GELUActivation"),
    "soft": (lambda: tiny.build("bert"), {"init_hardness": 0.5}, ValueError, r">= 1 .*got 0\.5"),
    "nan": (lambda: tiny.build("bert"), {"init_hardness": float("nan")}, ValueError, r"got nan"),
    "unbuildable": (lambda: Picky(BertConfig(**TEXT)), {}, hlg.ConversionError, r"saw 2 × GELU.*only GELU here"),
    "xlm": (lambda: XLMModel(XLMConfig(**SHARED)), {}, hlg.ConversionError, r"saw 2 × GELU.*ffns\.0\.act.*ffns\.1"),
    "flaubert": (lambda: FlaubertModel(FlaubertConfig(**SHARED)), {}, hlg.ConversionError, r"saw 2 × GELU.*ffns\.0\.act"),
    "openai-gpt": (lambda: OpenAIGPTModel(OpenAIGPTConfig(**GPT)), {}, hlg.ConversionError, r"OpenAIGPTModel"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    """What was got and what to do is said; the model, its config and the process-wide GELU are as before."""
    make, arguments, error, message = ERRORS[case]
    model = make()
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message):
        hlg.convert(model, **arguments)
    assert tiny.snapshot(model) == before
    assert type(activations.gelu) is activations.GELUActivation
