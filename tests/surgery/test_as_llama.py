"""Mistral and Qwen2 as a Llama: stock transformers puts out the same of both; what is not exact is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hf_lambda_gelu as hlg

SIZES = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def built(cls: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which begin as zeros
                parameter.normal_()
    return model.eval()


CASES: dict[str, tuple[Any, Any]] = {
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None, head_dim=8)),
    "window as long as the positions": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=64)),
    "classifier": (MistralForSequenceClassification, MistralConfig(**SIZES, sliding_window=None, num_labels=3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2, tied, yarn": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN)),
    "base": (Qwen2Model, Qwen2Config(**SIZES, rms_norm_eps=1e-3)),
}


def output(model: PreTrainedModel, length: int = 40) -> Tensor:
    tokens = torch.randint(1, 99, (1, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_function_from_stock_transformers(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cls, config = CASES[case]
    model = built(cls, config)
    if dtype != torch.float32:  # by a reload: `to` would round the rope's frequencies too
        model.to(dtype).save_pretrained(tmp_path / "own")
        model = cls.from_pretrained(tmp_path / "own").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = hlg.as_llama(model)
    assert type(made).__name__ == cls.__name__.replace("Mistral", "Llama").replace("Qwen2", "Llama")
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path).eval()
    assert loaded.dtype == dtype
    assert torch.equal(output(loaded), output(model))
    assert loaded.config.tie_word_embeddings == config.tie_word_embeddings
    own, copied = dict(model.named_parameters()), dict(made.named_parameters())
    assert len({p.data_ptr() for p in [*own.values(), *copied.values()]}) == len(own) + len(copied)  # nothing is shared
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not hasattr(loaded.config, "sliding_window")
    assert (made.config.attention_bias, made.config.mlp_bias) == ("qwen2" in case or case == "base", False)


def test_generation_and_hinges(tmp_path: Path) -> None:
    """Greedy tokens of the Llama are the model's; with four ReLUs per gate it is the sum, within the bound of each gate."""
    model = built(*CASES["qwen2"])
    model.generation_config.max_new_tokens = 9
    made = hlg.as_llama(model)
    prompt = torch.tensor([[5, 7, 11]])
    assert torch.equal(made.generate(prompt), model.generate(prompt))
    hlg.convert(model, init_hardness=1.5)
    made = hlg.as_llama(model)  # λ is carried over
    assert set(hlg.hardness_profile(made).values()) == {1.5}
    assert torch.equal(output(made), output(model))
    with pytest.raises(hlg.HingeError, match=r"has no bias, .* hlg.as_llama\(model\)"):
        hlg.relu_ize(model, hinges=4)
    report = hlg.relu_ize(made, hinges=5)
    folder = hlg.save_relu_pretrained(made, tmp_path / "relu")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded) is LlamaForCausalLM
    assert (loaded.config.intermediate_size, loaded.config.mlp_bias) == (120, True)
    assert torch.equal(output(loaded), output(made))
    difference = (output(loaded) - output(model)).abs().max() / output(model).abs().max()
    assert difference < 0.02
    card = (folder / "README.md").read_text()
    assert "It was a `Qwen2ForCausalLM`: its weights were saved as the Llama of the same function" in card
    assert "each replaced by 5 ReLUs in wider layers, which follow them within a bound for all inputs" in card
    assert "24 → 120 | 24 with 5 | 0.0168" in card  # 0.0252 / 1.5
    assert report.hinges.widths == {"intermediate_size": (24, 120)}


def test_refused_by_name() -> None:
    def refused(message: str, model: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match=message):
            hlg.as_llama(model)

    refused(
        "sliding_window = 16 is in effect for the last of 64 positions",
        built(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=16)),
    )
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    refused("layer_types has 'sliding_attention' for layer 1", built(Qwen2ForCausalLM, sliding))
    refused(r"Qwen3ForCausalLM \(qwen3\) cannot be saved", built(Qwen3ForCausalLM, Qwen3Config(**SIZES)))
    refused("it is one already", hlg.as_llama(built(*CASES["qwen2"])))
    model = built(*CASES["mistral"])
    model.model.layers[0].mlp.gate_proj.bias = torch.nn.Parameter(torch.zeros(24))
    refused("layers.0.mlp.gate_proj.bias has no place there", model)
    model = built(*CASES["mistral"])
    model.model.norm.register_forward_hook(lambda module, args, out: out * 1.001)
    refused("puts out something else, by 1.0e-03 of the largest output", model)
    refused("the model is on the meta device", built(*CASES["mistral"]).to("meta"))
