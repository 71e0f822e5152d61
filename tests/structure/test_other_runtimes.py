"""Runtimes that run another activation than the config's: told for ReLU, not for what the architecture had."""

from __future__ import annotations

import pytest
from support import tiny
from torch import nn

from hf_lambda_gelu.structure.other_runtimes import runtime_warnings


@pytest.mark.parametrize(
    ("name", "attribute", "activation", "warned"),
    [
        ("llama", "hidden_act", "silu", False),
        ("llama", "hidden_act", "swish", False),
        ("llama", "hidden_act", "relu", True),
        ("llama", "hidden_act", "gelu", True),
        ("gpt2", "activation_function", "gelu_new", False),
        ("gpt2", "activation_function", "relu", True),
        ("bert", "hidden_act", "gelu", False),
        ("bert", "hidden_act", "silu", True),
        ("vit", "hidden_act", "relu", False),
    ],
)
def test_models(name: str, attribute: str, activation: str, warned: bool) -> None:
    found = runtime_warnings(tiny.build(name, **{attribute: activation}))
    assert len(found) == warned
    assert all(f"whatever the config says ({activation})" in text for text in found)


def test_vllm_is_named_where_it_refuses() -> None:
    assert "vLLM's own llama takes SiLU alone" in runtime_warnings(tiny.build("llama", hidden_act="relu"))[0]
    assert "vLLM" not in runtime_warnings(tiny.build("bert", hidden_act="relu"))[0]


def test_no_transformers_model() -> None:
    assert runtime_warnings(nn.Linear(1, 1)) == ()
