"""`as_llama`: Mistral's and Qwen2's weights as the Llama of the same function, whose gates can have biases. [derived]"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from ..measurement.forward import call, main_output, measuring
from ..structure.adapters import has_adapters, how_to_merge
from ..structure.offloading import check_not_offloaded
from ..structure.quantised import quantised_weight
from ..structure.transaction import transaction

_NAMES = {"mistral": "Mistral", "qwen2": "Qwen2"}
# of a Mistral or a Qwen2 alone; without effect where `_check_attention` lets them pass
_ATTENTION = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_WRITTEN = ("model_type", "architectures", "transformers_version")
# relative to the largest output: the operations are the same, in the same order
_SAME = 1e-6
_TOKENS = 12


@transaction
def as_llama(model: PreTrainedModel) -> PreTrainedModel:
    """The Llama that computes what this Mistral or Qwen2 computes, with copies of its weights; the model stays as it is.

    Both are Llamas but for their configs, which have no attribute for biases of the feed-forward maps. A Llama's has,
    `mlp_bias`, and so its layers can hold several ReLUs per gate: `relu_ize(hinges=…)`. For the biases of Qwen2's q, k and v
    `attention_bias` is set, by which o gets one too, of zeros. λ, rope parameters, tied embeddings, generation config, dtype
    and device are carried over. Before it is returned, the Llama runs beside the model on made-up tokens.

    Args:
        model: of a class of Mistral or Qwen2, before or after `convert`.

    Returns:
        The model of Llama's class for the same task. A runtime that knows Llamas runs it; tokenizers stay what they are.

    Raises:
        ValueError: another architecture, a sliding window in effect, weights that have no place in a Llama, adapters,
            quantised or offloaded weights, or outputs that differ by more than 1e-6 of the largest.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        >>> config = Qwen2Config(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **heads)
        >>> type(hlg.as_llama(Qwen2ForCausalLM(config))).__name__
        'LlamaForCausalLM'
    """
    cls = _class(model)
    _check_weights(model)
    _check_attention(model.config)
    with torch.device("meta"):
        made: PreTrainedModel = cls(_config(model))
    _fill(made, model)
    made.train(model.training)
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    difference = _difference(model, made)
    if not difference <= _SAME:
        raise ValueError(
            f"the Llama of {type(model).__name__}'s weights puts out something else, by {difference:.1e} of the largest "
            "output: its config says something that a Llama does not do"
        )
    vars(made)["_llama_of"] = type(model).__name__  # for the card
    return made


def _class(model: PreTrainedModel) -> type[PreTrainedModel]:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    name = type(model).__name__
    if kind not in _NAMES or not name.startswith(_NAMES[kind]):
        why = "it is one already" if kind == "llama" else "its function is another, or its weights have no place there"
        raise ValueError(f"{name} ({kind}) cannot be saved as a Llama: {why}. Mistral and Qwen2 can")
    cls = getattr(transformers, name.replace(_NAMES[kind], "Llama", 1), None)
    if cls is None:
        raise ValueError(f"{name} cannot be saved as a Llama: transformers has no {name.replace(_NAMES[kind], 'Llama', 1)}")
    found: type[PreTrainedModel] = cls
    return found


def _check_weights(model: PreTrainedModel) -> None:
    if has_adapters(model):
        raise ValueError(f"{type(model).__name__} has adapters: {how_to_merge(model)}")
    quantised = quantised_weight(model)
    if quantised is not None:
        raise ValueError(f"{quantised} is quantised: make a Llama of the model first, then quantise that")
    check_not_offloaded(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where weights have no values: load them first")


def _check_attention(config: PreTrainedConfig) -> None:
    """ValueError where a layer attends to a window of the last tokens alone."""
    sliding = [i for i, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind != "full_attention"]
    if sliding:
        raise ValueError(
            f"config.layer_types has {config.layer_types[sliding[0]]!r} for layer {sliding[0]}: a Llama attends to all "
            "tokens"
        )
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"config.sliding_window = {window} is in effect for the last of {config.max_position_embeddings} positions: a "
            "Llama attends to all tokens. If it will never see more tokens than that, load it with sliding_window=None"
        )


def _config(model: PreTrainedModel) -> LlamaConfig:
    values: dict[str, Any] = copy.deepcopy(model.config.to_dict())
    for name in (*_WRITTEN, *_ATTENTION):
        values.pop(name, None)
    values["attention_bias"] = any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())
    config: LlamaConfig = LlamaConfig.from_dict({**values, "mlp_bias": False})
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = getattr(model.config, "_name_or_path", "")
    return config


def _fill(made: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy parameters and buffers by their names; biases of o that `model` lacks are zeros."""
    given: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = [*made.named_parameters(), *made.named_buffers()]
    missing = [name for name, _ in wanted if name not in given and not name.endswith("o_proj.bias")]
    extra = sorted(set(given) - {name for name, _ in wanted})
    if missing or extra:
        raise ValueError(
            f"{type(model).__name__} and {type(made).__name__} have not the same weights: "
            f"{f'{extra[0]} has no place there' if extra else f'{missing[0]} is not here'}"
        )
    for name, tensor in wanted:
        owner = made.get_submodule(name.rpartition(".")[0])
        source = given.get(name)
        if source is None:
            like = given[name.removesuffix("bias") + "weight"]
            source = torch.zeros(tensor.shape, dtype=like.dtype, device=like.device).requires_grad_(like.requires_grad)
        values = source.detach().clone()
        if isinstance(tensor, nn.Parameter):
            values = nn.Parameter(values, requires_grad=source.requires_grad)
        setattr(owner, name.rpartition(".")[2], values)
    made.tie_weights()


@torch.no_grad()
def _difference(model: PreTrainedModel, made: PreTrainedModel) -> float:
    """Of the outputs on made-up tokens, the first of them padding, relative to the largest."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, model.config.vocab_size, (1, _TOKENS), generator=generator, device="cpu")
    tokens = drawn.to(model.device)
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    outputs = []
    for each in (model, made):
        with measuring(each):
            outputs.append(main_output(call(each, batch)).double())
    one, other = outputs
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
