"""`convert`: the same function, the same weights, the right sites, and nothing else touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    FlaubertConfig,
    FlaubertModel,
    MambaConfig,
    MambaModel,
    OpenAIGPTConfig,
    OpenAIGPTModel,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerForSequenceClassification,
    XLMConfig,
    XLMModel,
    activations,
)
from transformers.activations import ACT2CLS, ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.modelling_code import calls_in_class

KEYS = {"gelu": "lambda_gelu", "gelu_tanh": "lambda_gelu_tanh", "quick_gelu": "lambda_quick_gelu", "silu": "lambda_silu"}
TEXT = tiny.MODELS["bert"][2]
SHARED = {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "gelu_activation": True}  # one module for all
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    """Whatever a test does, transformers' activation tables hold the same keys afterwards."""
    before = list(ACT2FN), list(ACT2CLS)
    yield
    assert (list(ACT2FN), list(ACT2CLS)) == before


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
    assert set(state) == {f"{site}.raw_hardness" for site in sites}
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


class Picky(BertModel):
    """A model whose construction fails with any activation but GELU."""

    def __init__(self, config: BertConfig) -> None:
        if config.hidden_act != "gelu":
            raise RuntimeError("only GELU here")
        super().__init__(config)


def converted() -> PreTrainedModel:
    """A model that has been through it."""
    model = tiny.build("bert")
    hlg.convert(model)
    return model


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
    "twice": (converted, {}, hlg.ConversionError, r"converted already: it has 3 λ-GELU modules"),
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


class ByFormula(nn.Module):
    """A GELU under a name that says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Foreign(nn.Module):
    """Not of transformers: known classes, an unknown one, one that is a ReLU, and a transformers model inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), ByFormula(), activations.QuickGELUActivation(), nn.Tanh())
        self.inner = tiny.build("bert")

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.second(self.first(x)).sum() + self.inner(input_ids=ids).logits


FOREIGN = {"first.1": "gelu", "first.3": "silu", "second.1": "gelu_tanh", "second.2": "quick_gelu"}


def test_plain_modules() -> None:
    """By what they compute, whatever they are called; a transformers model inside by its config."""
    model, x, ids = Foreign().eval(), torch.randn(3, 8), torch.randint(3, 99, (1, 5))
    expected = model(x, ids)
    report = hlg.convert(model)
    torch.testing.assert_close(model(x, ids), expected)
    plain = {site.name: site.base for site in report.sites if not site.attribute}
    assert plain == FOREIGN
    assert {site.attribute for site in report.sites} == {"", "inner.hidden_act"}
    assert len(hlg.hardness_sites(model)) == len(report.sites) == 7
    assert model.inner.config.hidden_act == "lambda_gelu"
    assert "no config attribute governs   4 × first.1 … second.2" in str(report)


def test_hard_coded_converted_when_asked() -> None:
    """BLOOM's own GELU class, governed by nothing; without being asked it is told and left."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)).eval()
    batch = tiny.inputs(model)
    expected, before = tiny.outputs(model, batch), tiny.snapshot(model)
    with pytest.raises(hlg.ConversionError, match=r"not convertible: .*BloomGelu: hard-coded"):
        hlg.convert(model)
    assert tiny.snapshot(model) == before
    report = hlg.convert(model, hard_coded=True)
    assert [(site.name, site.base, site.attribute) for site in report.sites] == [
        ("transformer.h.0.mlp.gelu_impl", "gelu_tanh", ""),
        ("transformer.h.1.mlp.gelu_impl", "gelu_tanh", ""),
    ]
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) <= 1e-5


def test_name_that_a_module_keeps() -> None:
    """Mamba hands "silu" to kernels by its name: nothing there is converted, and the reason is told."""
    torch.manual_seed(0)
    model = MambaModel(MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    before = tiny.snapshot(model)
    with pytest.raises(
        hlg.ConversionError, match=r"config\.hidden_act: silu: .*layers\.0\.mixer\.activation keeps its name"
    ):
        hlg.convert(model)
    assert tiny.snapshot(model) == before


def gated(x: Tensor) -> Tensor:
    """A function of the file, which calls another one."""
    return deeper(x) * x


def deeper(x: Tensor) -> Tensor:
    return nn.functional.silu(x)


def test_calls_are_read() -> None:
    """SiLU and quick GELU written as products, gates that are neither, functions that a method calls."""

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x *= torch.sigmoid(x)
            z = x * torch.sigmoid(x * self.alpha) + y.sigmoid() * y
            return z + x * torch.sigmoid(y) + torch.sigmoid(gated(z))

    assert calls_in_class(Model) == (
        "x *= torch.sigmoid(x)",
        "x * torch.sigmoid(x * self.alpha)",
        "y.sigmoid() * y",
        "nn.functional.silu(x)",
    )


def test_only() -> None:
    """A filter takes plain modules one by one, governed ones together; what it takes none of is said."""
    model = Foreign()
    report = hlg.convert(model, only=lambda name, module: name.startswith("first") or name.startswith("inner."))
    assert {site.name for site in report.sites if not site.attribute} == {"first.1", "first.3"}
    assert [i.name for i in report.unconverted if i.reason == "`only` does not take it"] == ["second.1", "second.2"]

    model = tiny.build("modernbert")
    report = hlg.convert(model, only=lambda name, module: "head" in name)
    assert [site.name for site in report.sites] == ["head.act"]
    assert (model.config.hidden_activation, model.config.classifier_activation) == ("gelu", "lambda_gelu")

    model = tiny.build("bert")
    before = tiny.snapshot(model)
    with pytest.raises(
        hlg.ConversionError, match=r"takes .*layer\.1\..* but not .*layer\.0\..*config\.hidden_act governs both"
    ):
        hlg.convert(model, only=lambda name, module: "layer.1" in name)
    with pytest.raises(hlg.ConversionError, match=r"`only` took none of \d+ modules, whose names are like 'bert\."):
        hlg.convert(model, only=lambda name, module: "decoder" in name)
    assert tiny.snapshot(model) == before
    with pytest.raises(hlg.ConversionError, match="expects a torch module, got str"):
        hlg.convert("bert-base-uncased")


def test_on_meta() -> None:
    """Without storage the same sites are converted; materialised, a reset gives λ as asked for."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(BertConfig(**TEXT))
    report = hlg.convert(model, init_hardness=2.5)
    assert [site.name for site in report.sites] == list(hlg.hardness_sites(converted()))
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
        assert {site.raw_hardness.dtype for site in hlg.hardness_sites(found).values()} == {torch.float32}
        assert hlg.hardness_profile(found) == pytest.approx(wanted, rel=1e-6)


def test_modes_are_kept() -> None:
    """Each site is in the mode of what it replaces, also where the model is partly in train mode."""
    model = tiny.build("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    hlg.convert(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [site.training for site in hlg.hardness_sites(model).values()] == [False, True, True]
