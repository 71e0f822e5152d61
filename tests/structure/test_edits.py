"""The only place that edits a model, against what the configs and modules say afterwards."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model

from hf_lambda_gelu.structure.edits import (
    add_bias,
    lambda_keys,
    remove_bias,
    replace_everywhere,
    set_activation,
    set_bias,
)

_SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}


def test_set_activation() -> None:
    """T5's attribute is derived, its halves hold copies: all three say the new key; a config that is shared does not."""
    shared = T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=9, feed_forward_proj="gated-gelu")
    model = T5Model(shared)
    assert set_activation(model, "dense_act_fn", "relu") == "relu"
    assert [c.dense_act_fn for c in (model.config, model.encoder.config, model.decoder.config)] == ["relu"] * 3
    assert model.config.feed_forward_proj == "gated-relu"
    assert (shared.dense_act_fn, shared.feed_forward_proj) == ("gelu_new", "gated-gelu")


def test_set_activation_that_does_not_stay() -> None:
    """The first key that a reload keeps is set; None with nothing changed where there is none."""

    class Stubborn(BertConfig):
        """Reloads as GELU, unless it is told ReLU."""

        def __init__(self, **values: object) -> None:
            super().__init__(**values)
            self.hidden_act = "relu" if values.get("hidden_act") == "relu" else "gelu"

    model = BertModel(Stubborn(**_SMALL))
    before = model.config.to_dict()
    assert set_activation(model, "hidden_act", "silu", "quick_gelu") is None
    assert model.config.to_dict() == before
    assert set_activation(model, "hidden_act", "silu", "relu") == "relu"
    assert model.config.hidden_act == "relu"


def test_bias() -> None:
    """A bias of zeros like the weight beside it, and away again; the switch is told to the submodules' configs too."""
    model = LlamaModel(LlamaConfig(**_SMALL)).to(torch.bfloat16)
    down = model.layers[0].mlp.down_proj
    bias = add_bias(model, "layers.0.mlp.down_proj.bias", 8)
    assert bias is down.bias
    assert (bias.dtype, tuple(bias.shape), float(bias.detach().abs().sum())) == (torch.bfloat16, (8,), 0.0)
    model.layers[0].mlp.config = LlamaConfig(**_SMALL)  # a copy
    set_bias(model, "mlp_bias", True)
    assert model.config.mlp_bias
    assert model.layers[0].mlp.config.mlp_bias
    remove_bias(model, "layers.0.mlp.down_proj.bias")
    assert down.bias is None
    assert "layers.0.mlp.down_proj.bias" not in dict(model.named_parameters())


def test_replace_everywhere() -> None:
    """A module that two names hold is replaced under both, on the device and in the mode of what was there."""
    gate, other = nn.GELU().eval(), nn.GELU()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), gate), "b": gate, "c": other})
    replace_everywhere(model, [gate], lambda module: nn.ReLU())
    assert [type(m) for m in (model["a"][1], model["b"], model["c"])] == [nn.ReLU, nn.ReLU, nn.GELU]
    assert not model["b"].training


def test_lambda_keys() -> None:
    """Where configs name a λ-GELU, also in a config that a submodule alone holds, each place once."""
    model = BertModel(BertConfig(**_SMALL, hidden_act="lambda_gelu"))
    model.config.other_act = "gelu"
    copy = BertConfig(**_SMALL, hidden_act="lambda_silu")
    model.encoder.layer[0].config = copy
    assert {(id(c), name, key) for c, name, key in lambda_keys(model)} == {
        (id(model.config), "hidden_act", "lambda_gelu"),
        (id(copy), "hidden_act", "lambda_silu"),
    }
