"""`convert`: the same function, the same weights, the right sites, and nothing else touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.models import converted
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerForSequenceClassification,
)
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg

KEYS = {"gelu": "lambda_gelu", "gelu_tanh": "lambda_gelu_tanh", "quick_gelu": "lambda_quick_gelu", "silu": "lambda_silu"}
TEXT = tiny.MODELS["bert"][2]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nested config as {dotted path: value}."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, item in value.items() for k, v in flat(item, f"{path}.{name}".lstrip(".")).items()}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_convert(name: str) -> None:
    """Against an unconverted twin from the same seed, tables written by hand, and the stock activations themselves."""
    model, twin = tiny.build(name), tiny.build(name)
    batch = tiny.inputs(twin)
    outputs, before = tiny.outputs(twin, batch), tiny.snapshot(twin)
    report = hlg.convert(model)

    assert tiny.relative_difference(outputs, tiny.outputs(model, batch)) <= 1e-5
    state = model.state_dict()
    for key, tensor in twin.state_dict().items():
        assert torch.equal(tensor, state.pop(key)), key
    sites = hlg.hardness_sites(model)
    assert list(sites) == [site.name for site in report.sites]
    assert set(state) == {f"{site}.unclipped_hardness" for site in sites}
    assert all(not module.training for module in model.modules())

    wanted = tiny.ACTIVATIONS[name]
    changes = {path: (act.value, KEYS[act.base]) for path, act in wanted.items()}
    assert report.attributes == changes
    if name.startswith("t5"):  # its dense_act_fn is derived from this one
        prefix = "gated-" if name == "t5" else ""
        changes["feed_forward_proj"] = (f"{prefix}gelu", prefix + changes["dense_act_fn"][1])
    old, new = flat(twin.config.to_dict()), flat(model.config.to_dict())
    assert {path: (old[path], new[path]) for path in new if old[path] != new[path]} == changes

    counts = Counter((site.attribute, site.was, site.base) for site in report.sites)
    assert counts == {(path, act.value, act.base): act.sites for path, act in wanted.items()}
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    for site in report.sites:  # the erf and tanh forms are 4e-4 apart
        torch.testing.assert_close(sites[site.name](grid), ACT2FN[site.was](grid), atol=1e-7, rtol=0)
    assert [(item.name, item.what) for item in report.unconverted] == tiny.LEFT.get(name, [])

    assert tiny.snapshot(twin) == before
    assert tiny.relative_difference(outputs, tiny.outputs(twin, batch)) == 0.0
    tiny.set_hardness(model, 1e4)
    assert tiny.relative_difference(outputs, tiny.outputs(model, batch)) > 1e-3, "the activation does not matter here"


@pytest.mark.parametrize("name", tiny.MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """λ chosen here, another at each site, comes back through a checkpoint, and so does the function."""
    model = tiny.build(name)
    hlg.convert(model)
    wanted = tiny.set_hardness(model, 1.37, step=0.83)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hlg.hardness_profile(loaded) == pytest.approx(wanted, rel=1e-6)
    assert {n: m.base for n, m in hlg.hardness_sites(loaded).items()} == {
        n: m.base for n, m in hlg.hardness_sites(model).items()
    }
    batch = tiny.inputs(model)
    for parameter in loaded.parameters():  # where the mapped file puts a vector can change the last bit of a product with it
        parameter.data = parameter.data.clone()
    assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(loaded.eval(), batch)) == 0.0


def test_report_text() -> None:
    """The printed tables, word for word."""
    assert str(hlg.convert(tiny.build("roberta"), init_hardness=1.5)).splitlines() == [
        "converted 2 activations to λ-GELU at λ = 1.5",
        "  config.hidden_act: gelu → lambda_gelu   2 × roberta.encoder.layer.0.intermediate.intermediate_act_fn … "
        "roberta.encoder.layer.1.intermediate.intermediate_act_fn",
        "1 left as they are",
        "  lm_head: gelu(x): a function call in the modelling code, out of reach of a module swap",
    ]
    assert str(hlg.convert(tiny.build("modernbert"))).splitlines() == [
        "converted 3 activations to λ-GELU at λ = 1",
        "  config.hidden_activation: gelu → lambda_gelu   2 × model.layers.0.mlp.act … model.layers.1.mlp.act",
        "  config.classifier_activation: gelu → lambda_gelu   1 × head.act",
    ]


@pytest.mark.parametrize("make", [BertModel, BertModel._from_config], ids=["constructor", "from_config"])
def test_config_object_of_two_models(make: Callable[[BertConfig], PreTrainedModel]) -> None:
    """Two models made from one config object share it: the other one's config is its own business all the same."""
    config = BertConfig(**TEXT)
    model, other = make(config), make(config)
    before = tiny.snapshot(other)
    hlg.convert(model)
    assert tiny.snapshot(other) == before
    assert config.hidden_act == "gelu"
    assert model.config.hidden_act == model.encoder.layer[0].attention.self.config.hidden_act == "lambda_gelu"


def test_hard_coded_modules() -> None:
    """Activations that a user attached are listed, by place and kind, and left."""
    model = tiny.build("bert")
    model.extra = nn.GELU()
    model.bert.encoder.layer[1].extra = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.ReLU(), nn.GELU(approximate="tanh"))
    kept = model.extra, *model.bert.encoder.layer[1].extra
    report = hlg.convert(model)
    left = {(item.name, item.what) for item in report.unconverted}
    place = "bert.encoder.layer.1.extra"
    assert left == {("extra", "GELU"), (f"{place}.1", "SiLU"), (f"{place}.3", "GELU")}
    assert (model.extra, *model.bert.encoder.layer[1].extra) == kept
    assert len(report.sites) == 3
    assert all("hard-coded" in line for line in str(report).splitlines()[-3:])


def test_lookup_in_forward() -> None:
    """RoFormer's classifier looks `hidden_act` up at each call: no site, but told, and the function is kept."""
    torch.manual_seed(0)
    model = RoFormerForSequenceClassification(RoFormerConfig(**TEXT)).eval()
    batch = tiny.inputs(model)
    outputs = tiny.outputs(model, batch)
    report = hlg.convert(model)
    assert len(report.sites) == 2
    assert [(item.name, item.what) for item in report.unconverted] == [("classifier", "ACT2FN[self.config.hidden_act]")]
    assert "it turns into ReLU with relu_ize, unprepared" in str(report)
    assert tiny.relative_difference(outputs, tiny.outputs(model, batch)) <= 1e-5


def test_instance_shared_by_layers() -> None:
    """Two sites that were one module object get a λ each."""
    model = tiny.build("bert")
    first, second = (layer.intermediate for layer in model.bert.encoder.layer)
    second.intermediate_act_fn = first.intermediate_act_fn
    assert len(hlg.convert(model).sites) == 3
    assert first.intermediate_act_fn is not second.intermediate_act_fn
    first.intermediate_act_fn.set_hardness(3.0)
    assert [round(value, 5) for value in hlg.hardness_profile(model).values()] == [3.0, 1.0, 1.0]


def test_on_meta() -> None:
    """Without storage the same sites are converted; materialised, a reset gives λ as asked for."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(BertConfig(**TEXT))
    report = hlg.convert(model, init_hardness=2.5)
    assert [site.name for site in report.sites] == list(hlg.hardness_sites(converted("bert")))
    assert all(parameter.is_meta for parameter in model.parameters())
    site = hlg.hardness_sites(model)[report.sites[-1].name].to_empty(device="cpu")
    site.reset_parameters()
    assert site.hardness.item() == pytest.approx(2.5, rel=1e-6)


def test_bf16(tmp_path: Path) -> None:
    """In bf16 the weights stay bf16 and λ fp32, through casts and checkpoints: 1.2345 is no bf16 number."""
    model, twin = tiny.build("bert").to(torch.bfloat16), tiny.build("bert").to(torch.bfloat16)
    batch = tiny.inputs(model)
    hlg.convert(model)
    assert tiny.relative_difference(tiny.outputs(twin, batch), tiny.outputs(model, batch)) < 0.02
    state = model.state_dict()
    assert all(
        torch.equal(tensor, state[key]) and state[key].dtype == tensor.dtype for key, tensor in twin.state_dict().items()
    )
    wanted = tiny.set_hardness(model, 1.2345, step=1.0)
    model.half().to(torch.bfloat16).save_pretrained(tmp_path)
    for found in (model, type(model).from_pretrained(tmp_path)):
        assert found.dtype == torch.bfloat16
        assert {site.unclipped_hardness.dtype for site in hlg.hardness_sites(found).values()} == {torch.float32}
        assert hlg.hardness_profile(found) == pytest.approx(wanted, rel=1e-6)


def test_modes_are_kept() -> None:
    """Each site is in the mode of what it replaces, also where the model is partly in train mode."""
    model = tiny.build("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    hlg.convert(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [site.training for site in hlg.hardness_sites(model).values()] == [False, True, True]


def test_hooks_of_an_activation_go_along() -> None:
    """What a user's hook makes of an activation's output is part of the function; his handle takes it off again."""
    model = tiny.build("bert-classifier")
    batch, place = tiny.inputs(model), "bert.encoder.layer.0.intermediate.intermediate_act_fn"
    plain = tiny.outputs(model, batch)
    handle = model.get_submodule(place).register_forward_hook(lambda module, args, output: 3.0 * output)
    hooked = tiny.outputs(model, batch)
    assert tiny.relative_difference(plain, hooked) > 0.1
    hlg.convert(model)
    assert tiny.relative_difference(hooked, tiny.outputs(model, batch)) < 1e-6
    with hlg.gates_as_relu(model):
        expected = tiny.outputs(model, batch)
    hlg.relu_ize(model, force=True)
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) < 1e-6
    handle.remove()
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) > 0.1
