"""Which configs are copies of which: by what the class builds from them, however alike others are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.config_probe import copied_configs

_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
_IMAGE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8}


class PairConfig(PreTrainedConfig):
    model_type = "pair_of_bert"
    sub_configs: ClassVar = {"first": BertConfig, "second": BertConfig}

    def __init__(self, first: object = None, second: object = None, **values: object) -> None:
        self.first, self.second = (c if isinstance(c, BertConfig) else BertConfig(**(c or {})) for c in (first, second))
        super().__init__(**values)


class Pair(PreTrainedModel):
    """Two BERTs of equal configs; the second gets a copy of its own."""

    config_class = PairConfig

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self.one, self.two = BertModel(config.first), BertModel(copy.deepcopy(config.second))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.one(input_ids)[0] + self.two(input_ids)[0]}


def pair() -> Pair:
    torch.manual_seed(0)
    return Pair(PairConfig(BertConfig(**_SMALL), BertConfig(**_SMALL))).eval()


def encoder_decoder() -> EncoderDecoderModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**_SMALL), BertConfig(**_SMALL))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return EncoderDecoderModel(config).eval()


def dual() -> VisionTextDualEncoderModel:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**_IMAGE, patch_size=4), BertConfig(**_SMALL), projection_dim=4
    )
    return VisionTextDualEncoderModel(config).eval()


# model → (part that is taken, path of its attribute, path of the other's, part of the other)
MODELS = {
    "pair, first": (pair, "one", "first.hidden_act", "second.hidden_act", "two"),
    "pair, second": (pair, "two", "second.hidden_act", "first.hidden_act", "one"),
    "decoder": (encoder_decoder, "decoder", "decoder.hidden_act", "encoder.hidden_act", "encoder"),
    "text": (dual, "text_model", "text_config.hidden_act", "vision_config.hidden_act", "vision_model"),
}


def value(config: object, path: str) -> str:
    for name in path.split("."):
        config = getattr(config, name)
    assert isinstance(config, str)
    return config


@pytest.mark.parametrize("verb", ["relu_ize", "fold"])
@pytest.mark.parametrize("name", MODELS)
def test_one_of_two_alike(name: str, verb: str, tmp_path: Path) -> None:
    """The other keeps its activation through convert, the block in which λ reads ReLU, relu_ize and fold, and a reload."""
    build, part, path, other_path, other = MODELS[name]
    model = build()
    hlg.convert(model, init_hardness=1e4, only=lambda module_name, module: module_name.startswith(part))
    configs = model.get_submodule(part).config, model.get_submodule(other).config
    assert [c.hidden_act for c in configs] == ["lambda_gelu", "gelu"]
    assert (value(model.config, path), value(model.config, other_path)) == ("lambda_gelu", "gelu")
    with hlg.gates_as_relu(model):
        assert [c.hidden_act for c in configs] == ["relu", "gelu"]
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    if name == "decoder":
        batch["decoder_input_ids"] = torch.tensor([[3, 4]])
    if name == "text":
        batch["pixel_values"] = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if verb == "relu_ize":
        hlg.relu_ize(model)
    else:
        hlg.fold(model, batch)
    stock = "relu" if verb == "relu_ize" else "gelu"
    held = [model.get_submodule(p).config.hidden_act for p in (part, other)]
    assert (held, value(model.config, path), value(model.config, other_path)) == ([stock, "gelu"], stock, "gelu")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for parameter in again.parameters():  # mapped memory is aligned otherwise, which can change the last bit
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        outputs = [m(**batch) for m in (model, again)]
    name_of = "logits" if "logits" in outputs[0] else "logits_per_text"
    assert torch.equal(outputs[0][name_of], outputs[1][name_of])


def test_copies() -> None:
    """T5's two stacks; both of a pair, each under its path; a config that was replaced later; none that is merely alike."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    t5.resize_token_embeddings(11)
    copies = {id(c) for c in copied_configs(t5, "dense_act_fn")}
    assert {id(t5.encoder.config), id(t5.decoder.config)} <= copies
    assert id(t5.config) not in copies

    model = pair()
    assert copied_configs(model, "first.hidden_act") == []  # the same object
    assert [c is model.two.config for c in copied_configs(model, "second.hidden_act")] == [True]
    model.config = copy.deepcopy(model.config)  # by the user
    assert [c is model.one.config for c in copied_configs(model, "first.hidden_act")] == [True]

    class Alike(BertPreTrainedModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.bert, self.other = BertModel(config), BertModel(BertConfig(**_SMALL))
            self.post_init()

    alike = Alike(BertConfig(**_SMALL))
    assert copied_configs(alike, "hidden_act") == []
    hlg.convert(alike, only=lambda name, module: name.startswith("bert"))
    assert (alike.bert.config.hidden_act, alike.other.config.hidden_act) == ("lambda_gelu", "gelu")


def test_switches() -> None:
    """A switch that is true or false is told to copies alone, not to a part that has the value by itself."""

    class Two(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.copied = LlamaModel(copy.deepcopy(config))
            self.own = LlamaModel(LlamaConfig(**_SMALL, mlp_bias=True))
            self.post_init()

    model = Two(LlamaConfig(**_SMALL))
    copies = {id(c) for c in copied_configs(model, "mlp_bias")}
    assert id(model.copied.config) in copies
    assert id(model.own.config) not in copies


def test_wrapper_and_shared_config() -> None:
    """PEFT's wrapper shows the config that the model has now; another model with the same config object keeps its own."""
    config = BertConfig(**_SMALL)
    model, other = BertModel(config), BertModel(config)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"]))
    hlg.convert(wrapped)
    assert wrapped.config is model.config
    assert (wrapped.config.hidden_act, other.config.hidden_act, config.hidden_act) == ("lambda_gelu", "gelu", "gelu")
    hlg.relu_ize(wrapped, force=True)
    assert (wrapped.config.hidden_act, model.encoder.config.hidden_act, other.config.hidden_act) == ("relu", "relu", "gelu")
