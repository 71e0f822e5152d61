"""Adapters of every kind, prompts, and ways to put them in: λ is beside them, and base weights are changed under none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from support import tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.adapter_hardness import _save_pretrained

LAYERS = ["query", "intermediate.dense", "output.dense"]
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "ia3": lambda: IA3Config(target_modules=["key", *LAYERS[1:]], feedforward_modules=["output.dense"]),
    "loha": lambda: LoHaConfig(r=4, target_modules=LAYERS),
    "oft": lambda: OFTConfig(r=1, oft_block_size=0, target_modules=LAYERS),
    "vera": lambda: VeraConfig(r=4, target_modules=["query", "key"]),
    "dora": lambda: LoraConfig(r=4, use_dora=True, lora_dropout=0.1, bias="all", target_modules=LAYERS),
    "norms": lambda: LNTuningConfig(target_modules=["LayerNorm"]),
}
PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoder": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
NAMES = {"bert-classifier": KINDS, "llama": PROMPTS}
LORA = LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False)


def adapted(base: PreTrainedModel, config: PeftConfig, seed: int = 1) -> PeftModel:
    """With adapters that differ from what they are at first, which is nothing."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def batches(count: int = 1) -> list[dict[str, Tensor]]:
    """Batches whose first example ends in padding."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 11, dtype=torch.long)
    mask[0, 7:] = 0
    return [{"input_ids": torch.randint(3, 99, (4, 11), generator=generator), "attention_mask": mask} for _ in range(count)]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in NAMES.items() for kind in kinds])
def test_hardness_is_beside_every_kind(tmp_path: Path, name: str, kind: str) -> None:
    """λ trains, is saved and comes back with the adapters, be they in layers or before them."""
    base = tiny.build(name)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, NAMES[name][kind]())
    hlg.convert(model)
    assert all(site.unclipped_hardness.requires_grad for site in hlg.hardness_sites(model).values())
    tiny.set_hardness(model, 2.5, step=0.7)
    expected = tiny.outputs(model, batches()[0])
    model.save_pretrained(tmp_path / "adapters")
    fresh = type(base).from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(fresh, tmp_path / "adapters").eval()
    hlg.convert(found)
    assert tiny.relative_difference(expected, tiny.outputs(found, batches()[0])) > 1e-4
    hlg.load_hardness(found, tmp_path / "adapters")
    assert tiny.relative_difference(expected, tiny.outputs(found, batches()[0])) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_substituted_and_merged(kind: str) -> None:
    """What PEFT merges is the ReLU network that transformers builds of the weights that it merges without this package."""
    base = tiny.build("bert-classifier").double()
    model = adapted(base, KINDS[kind]())
    plain = copy.deepcopy(model).merge_and_unload()
    stock = tiny.build("bert-classifier", hidden_act="relu").double()
    stock.load_state_dict(plain.state_dict())
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    expected = tiny.outputs(stock, batches()[0])
    assert tiny.relative_difference(expected, tiny.outputs(model, batches()[0])) <= 1e-10
    assert tiny.relative_difference(expected, tiny.outputs(model.merge_and_unload(), batches()[0])) <= 1e-10


def by_get_peft_model(base: PreTrainedModel) -> nn.Module:
    return get_peft_model(base, LORA)


def the_model_inside(base: PreTrainedModel) -> nn.Module:
    model: nn.Module = get_peft_model(base, LORA).get_base_model()
    return model


def injected(base: PreTrainedModel) -> nn.Module:
    return inject_adapter_in_model(LORA, base)


def by_transformers(base: PreTrainedModel) -> nn.Module:
    base.add_adapter(LORA)
    return base


def merged_in_place(base: PreTrainedModel) -> nn.Module:
    model = get_peft_model(base, LORA)
    model.merge_adapter()
    return model


def switched_off(base: PreTrainedModel) -> nn.Module:
    model = get_peft_model(base, LORA)
    model.disable_adapter_layers()
    return model


def one_of_two(base: PreTrainedModel) -> nn.Module:
    model = get_peft_model(base, LORA)
    model.add_adapter("other", LORA)
    return model


def scaled_activations(base: PreTrainedModel) -> nn.Module:
    return adapted(base, KINDS["ia3"]())


def a_trained_head(base: PreTrainedModel) -> nn.Module:
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)  # PEFT adds the classifier
    return get_peft_model(base, config)


OLD = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
WAYS = [by_get_peft_model, the_model_inside, injected, merged_in_place]
WAYS += [pytest.param(by_transformers, marks=pytest.mark.skipif(OLD, reason=f"add_adapter wants peft {MIN_PEFT_VERSION}"))]
WAYS += [switched_off, one_of_two, scaled_activations, a_trained_head]
VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "fold": lambda model: hlg.fold(model, batches()[0]),
    "refit": lambda model: hlg.relu_ize(model, calibration=batches(), compensate="least_squares"),
    "harden": lambda model: hlg.harden(model, batches()),
    "hinges": lambda model: hlg.relu_ize(model, calibration=batches(), hinges=4),
}


@pytest.mark.parametrize("way", WAYS)
def test_base_weights_are_not_changed_under_adapters(tmp_path: Path, way: Callable[[PreTrainedModel], nn.Module]) -> None:
    """What suits the adapters in effect is wrong for others, for none, and on the base that their files name."""
    model = way(tiny.build("bert-classifier")).eval()
    hlg.convert(model)
    tiny.set_hardness(model, 7.0)
    before = tiny.snapshot(model)
    for verb in VERBS.values():
        with pytest.raises(ValueError, match=r"has adapters in its layers \(.* is PEFT's .*\), .*merge_and_unload"):
            verb(model)
        assert tiny.snapshot(model) == before
    hlg.relu_ize(model, force=True)
    with pytest.raises(ValueError, match=r"has adapters or prompts \(.*merge_and_unload"):
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    with pytest.raises(ValueError, match=r"has adapters in its layers.*pruning changes base weights"):
        hlg.prune_dead_units(model, batches())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_refit_under_prompts(tmp_path: Path, kind: str) -> None:
    """The layers are the base's own: it is saved without the prompts, and computes the same with them again."""
    model = adapted(tiny.build("llama"), PROMPTS[kind]())
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=batches(12), compensate="least_squares")
    assert report.compensation is not None
    assert len(report.compensation.sites) == 2
    with pytest.raises(ValueError, match=r"has adapters or prompts.*Prompts cannot be merged: do it with the base"):
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    hlg.save_relu_pretrained(model.get_base_model(), tmp_path / "base")
    model.save_pretrained(tmp_path / "prompts")
    base = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(base, tmp_path / "prompts").eval()
    expected = tiny.outputs(model, batches()[0])
    assert tiny.relative_difference(expected, tiny.outputs(found, batches()[0])) <= 1e-6


@pytest.mark.parametrize("converted_before", [False, True])
def test_a_base_that_is_no_longer_what_was_loaded(
    tmp_path: Path, converted_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters that are saved after `relu_ize` name a base with GELU: that is said, and no λ of before is left."""
    base = tiny.build("bert-classifier")
    if converted_before:
        hlg.convert(base)
    model = adapted(base, LORA)
    if not converted_before:
        hlg.convert(model)
        model.save_pretrained(tmp_path)
    hlg.relu_ize(model, force=True)
    _save_pretrained.__globals__["logger"].warning_once.cache_clear()
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert "do not hold what has become of their base" in caplog.text
    assert not (tmp_path / "lambda_gelu_hardness.safetensors").exists()


def test_a_loop_that_trains_what_was_converted_before(tmp_path: Path) -> None:
    """λ that PEFT froze, and that an own loop trains all the same, is saved beside the adapters too."""
    base = tiny.build("bert-classifier")
    hlg.convert(base)
    model = adapted(base, LORA)
    for site in hlg.hardness_sites(model).values():
        site.requires_grad_(True)
    hlg.attach_hardness_update(torch.optim.SGD(hlg.parameter_groups(model), lr=0.1), model)
    tiny.set_hardness(model, 3.0)
    model.save_pretrained(tmp_path)
    tiny.set_hardness(model, 1.0)
    hlg.load_hardness(model, tmp_path)
    assert set(hlg.hardness_profile(model).values()) == {3.0}


def head(**overrides: Any) -> PreTrainedModel:
    return tiny.build("modernbert", **overrides)


def experts(**overrides: Any) -> PreTrainedModel:
    values = {**tiny.GATED, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **values, **overrides)
    return tiny.enliven(AutoModelForCausalLM.from_config(config)).eval()


# what PEFT wraps → the model, the adapters, the names that sites have then, what makes stock transformers build ReLU
WRAPPED: dict[str, tuple[Callable[..., PreTrainedModel], PeftConfig, list[str], dict[str, Any]]] = {
    "a head": (
        head,
        LoraConfig(r=4, target_modules=["Wqkv"], modules_to_save=["head"]),
        [
            "model.layers.0.mlp.act",
            "model.layers.1.mlp.act",
            "head.original_module.act",
            "head.modules_to_save.default.act",
        ],
        tiny.relu_overrides("modernbert"),
    ),
    "experts": (
        experts,
        LoraConfig(r=8, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
        [f"model.layers.{layer}.mlp.experts.base_layer.base_layer.act_fn" for layer in (0, 1)],
        {"hidden_act": "relu"},
    ),
}


@pytest.mark.parametrize("converted_before", [False, True])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_sites_in_what_peft_wraps(wrapped: str, converted_before: bool) -> None:
    """The config governs them under the names that they have within: of a trained head, PEFT keeps the original too."""
    build, config, names, overrides = WRAPPED[wrapped]
    base = build()
    if converted_before:
        hlg.convert(base)
    model = adapted(base, config)
    if not converted_before:
        expected = tiny.outputs(model, batches()[0])
        assert all(site.attribute for site in hlg.convert(model).sites)
        assert tiny.relative_difference(expected, tiny.outputs(model, batches()[0])) <= 1e-5
    assert [name.removeprefix("base_model.model.") for name in hlg.hardness_sites(model)] == names
    plain = copy.deepcopy(model).merge_and_unload().state_dict()
    stock = build(**overrides)
    stock.load_state_dict({name: value for name, value in plain.items() if "hardness" not in name})
    assert not hlg.relu_ize(model, force=True).folded
    expected = tiny.outputs(stock, batches()[0])
    assert tiny.relative_difference(expected, tiny.outputs(model.merge_and_unload(), batches()[0])) <= 1e-5
    assert {key: getattr(model.config, key) for key in overrides} == overrides
