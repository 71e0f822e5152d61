"""What a model runs, against what is known of it: its modelling code read by hand, or a formula written here."""

from __future__ import annotations

import json
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.activations import ACT2FN

from hf_lambda_gelu import convert, gates_as_relu, lambda_gelu, lambda_gelu_reference, relu_ize
from hf_lambda_gelu.measurement.audit.audit import AuditReport, audit

ARCHITECTURES = ["bert", "bert-classifier", "roberta", "distilbert", "albert", "deberta-v2", "vit", "clip"]
ARCHITECTURES += ["gpt2", "whisper", "wav2vec2", "t5", "gemma2", "llama"]
# kinds that no table in tests/tiny.py holds: tanh poolers and soft caps
EXTRA = {"bert-classifier": {"tanh": 1}, "gemma2": {"tanh": 3}}
# functional calls; both of whisper's are in one module
FUNCTIONAL = {"roberta": 1, "deberta-v2": 1, "whisper": 1}


def kinds(report: AuditReport) -> dict[str, str]:
    return {entry.name: entry.kind for entry in report.entries}


class Apply(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def network(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), Apply(function), nn.Linear(64, 4)).to(dtype)


def x_of(dtype: torch.dtype = torch.float32, rows: int = 16) -> Tensor:
    return (torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)) * 3.0).to(dtype)


def kind_of(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> str:
    (entry,) = audit(network(function, dtype), x_of(dtype)).entries
    return entry.kind


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    model = tiny.build(name)
    report = audit(model, tiny.inputs(model))
    expected: Counter[str] = Counter(EXTRA.get(name, {}))
    for activation in tiny.ACTIVATIONS[name].values():
        expected[activation.base] += activation.sites
    expected["gelu"] += FUNCTIONAL.get(name, 0)
    if name == "albert":  # one layer runs three times, and tiny.ACTIVATIONS counts it and the head
        assert [entry.calls for entry in report.entries] == [3, 1]
    assert report.counts == {kind: count for kind, count in expected.items() if count}
    assert not report.is_relu
    assert not report.unreached


@pytest.mark.parametrize("name", ["bert", "clip", "llama", "roberta", "deberta-v2"])
def test_conversion_and_substitution(name: str) -> None:
    model = tiny.build(name)
    batch = tiny.inputs(model)
    sites = [site.name for site in convert(model).sites]
    tiny.set_hardness(model, 2.0)
    before = audit(model, batch)
    soft = [entry for entry in before.entries if entry.kind == "lambda_gelu"]
    assert {entry.name for entry in soft} == set(sites)
    assert {entry.base for entry in soft} == {a.base for a in tiny.ACTIVATIONS[name].values()}
    assert [entry.hardness for entry in soft] == pytest.approx([2.0] * len(sites))
    left = {entry.name for entry in before.smooth} - set(sites)
    assert left == {"roberta": {"lm_head"}, "deberta-v2": {"pooler"}}.get(name, set())
    with gates_as_relu(model):
        assert {kinds(audit(model, batch))[site] for site in sites} == {"relu"}
    relu_ize(model, force=True)
    after = audit(model, batch)
    assert {kinds(after)[site] for site in sites} == {"relu"}
    assert all(0.1 < entry.zeros < 0.9 for entry in after.entries if entry.kind == "relu")
    assert {entry.name for entry in after.smooth} == left
    assert after.is_relu == (not left)


def small(model_type: str, auto: Any = AutoModel, **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **values))


def test_formulas_of_transformers() -> None:
    bloom = small("bloom", AutoModelForCausalLM, vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    with torch.no_grad():
        bloom.transformer.h[0].mlp.dense_h_to_4h.weight.mul_(30.0)
    assert kinds(audit(bloom)) == {f"transformer.h.{i}.mlp.gelu_impl": "gelu_tanh" for i in range(2)}
    values = {key: tiny.MODELS["bert"][2][key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    esm = small("esm", AutoModelForMaskedLM, vocab_size=33, intermediate_size=37, pad_token_id=1, mask_token_id=32, **values)
    expected = {f"esm.encoder.layer.{i}.intermediate": "gelu" for i in range(2)} | {"lm_head": "gelu"}
    assert kinds(audit(esm)) == expected
    t5 = small("t5", **tiny.MODELS["t5"][2] | {"feed_forward_proj": "relu"})
    report = audit(t5)
    assert report.is_relu
    assert report.counts == {"relu": 4}


FORMULAS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "half_first": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "half_second": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.70710678))),
    "half_last": ("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5),
    "half_inside": ("gelu", lambda x: x * (0.5 * (1 + torch.erf(x / math.sqrt(2))))),
    "distributed": ("gelu", lambda x: 0.5 * x + 0.5 * x * torch.erf(x / math.sqrt(2))),
    "erfc": ("gelu", lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2))),
    "ndtr": ("gelu", lambda x: x * torch.special.ndtr(x)),
    "cdf": ("gelu", lambda x: x * torch.distributions.Normal(0.0, 1.0).cdf(x)),
    "tanh": ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "tanh_bloom": ("gelu_tanh", lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))),
    "tanh_as_sigmoid": ("gelu_tanh", lambda x: x * torch.sigmoid(2 * 0.79788456 * (x + 0.044715 * x**3))),
    "quick": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": ("silu", lambda x: x * torch.sigmoid(x)),
    "silu_in_place": ("silu", lambda x: x.clone().mul_(torch.sigmoid(x))),
    "silu_as_tanh": ("silu", lambda x: 0.5 * x * (1 + torch.tanh(0.5 * x))),
    "silu_as_exp": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "silu_in_fp32": ("silu", lambda x: x * torch.sigmoid(x.float()).to(x.dtype)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, dtype: torch.dtype) -> None:
    kind, function = FORMULAS[name]
    (entry,) = audit(network(function, dtype), x_of(dtype)).entries
    assert (entry.name, entry.kind, entry.hardness, entry.group) == ("1", kind, None, "smooth")


@pytest.mark.parametrize("base", ["gelu", "gelu_tanh", "silu"])
def test_hardness_of_formulas(base: str) -> None:
    (entry,) = audit(network(lambda x: lambda_gelu_reference(x, 3.0, base)), x_of()).entries
    assert (entry.kind, entry.group) == (base, "smooth")
    assert entry.hardness == pytest.approx(3.0, rel=1e-3)


def test_function_with_one_hardness_per_neuron() -> None:
    """The operator behind `lambda_gelu` is seen as what it is, with the softest of its gates."""
    hardness = torch.linspace(3.0, 9.0, 64)
    report = audit(network(lambda x: lambda_gelu(x, hardness, "silu")), x_of())
    (entry,) = report.entries
    assert (entry.kind, entry.group, entry.base, entry.hardness) == ("lambda_gelu", "smooth", "silu", 3.0)
    assert not report.opaque


def test_formula_in_a_child_that_is_only_its_gate() -> None:
    class Quick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(1.702 * x)

    report = audit(nn.Sequential(nn.Linear(8, 32), Quick()), x_of())
    assert kinds(report) == {"1": "quick_gelu"}
    assert not report.unreached


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, dim=-1)


OTHERS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "tanh": ("tanh", "other", lambda x: torch.tanh(x).repeat(1, 1)),
    "sigmoid": ("sigmoid", "other", torch.sigmoid),
    "soft cap": ("tanh", "other", lambda x: 30.0 * torch.tanh(x / 30.0)),
    "glu": ("sigmoid gate", "other", lambda x: F.glu(x).repeat(1, 2)),
    "written glu": ("sigmoid gate", "other", lambda x: (halves(x)[0] * halves(x)[1].sigmoid()).repeat(1, 2)),
    "normed gate": ("sigmoid gate", "other", lambda x: x * torch.sigmoid(F.layer_norm(x, (64,)))),
    "reversed": ("self_gated", "smooth", lambda x: x * (1 - torch.sigmoid(x))),
    "clamped": ("self_gated", "smooth", lambda x: x.clamp(max=2.0) * torch.sigmoid(x)),
    "tanh times another": ("tanh", "other", lambda x: (halves(x)[0] * halves(x)[1].tanh()).repeat(1, 2)),
    "laplace": ("erf", "other", ACT2FN["laplace"]),
    "relu": ("relu", "piecewise", F.relu),
    "relu in place": ("relu", "piecewise", lambda x: F.relu(x, inplace=True)),
    "clamp": ("relu", "piecewise", lambda x: x.clamp(min=0)),
    "clamp_min": ("relu", "piecewise", lambda x: torch.clamp_min(x, 0.0)),
    "maximum": ("relu", "piecewise", lambda x: torch.maximum(x, torch.zeros(()))),
    "relu6": ("relu6", "piecewise", F.relu6),
    "hardtanh": ("hardtanh", "piecewise", F.hardtanh),
    "leaky": ("leaky_relu", "piecewise", F.leaky_relu),
    "relu2": ("relu2", "smooth", ACT2FN["relu2"]),
    "relu2 as product": ("relu2", "smooth", lambda x: (lambda r: r * r)(F.relu(x))),
    "out": ("gelu", "smooth", lambda x: torch._C._nn.gelu(x, out=torch.empty_like(x))),
    **{
        name: (name, "smooth", function)
        for name, function in {
            "mish": F.mish,
            "softplus": F.softplus,
            "elu": F.elu,
            "selu": F.selu,
            "celu": F.celu,
            "hardswish": F.hardswish,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": lambda x: F.silu(x, inplace=True),
        }.items()
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_kinds(name: str) -> None:
    kind, group, function = OTHERS[name]
    (entry,) = audit(network(function), x_of()).entries
    assert (entry.kind, entry.group) == (kind, group)


def test_factors_with_a_soft_cap() -> None:
    report = audit(network(lambda x: 3.0 * torch.tanh(x / 3.0) * torch.sigmoid(x)), x_of())
    assert report.counts == {"tanh": 1, "self_gated": 1}
    assert [entry.calls for entry in report.entries] == [1, 1]


def test_no_activation() -> None:
    def none(x: Tensor) -> Tensor:
        x = F.layer_norm(x, (64,)).softmax(-1) * x.cos() + x.clamp(-50.0, 50.0) * torch.exp(-x.abs())
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    report = audit(network(none), x_of())
    assert report.entries == ()
    assert not report.is_relu


def test_a_function_of_a_parameter_is_no_activation() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.softplus(self.scale) * self.scale.view(1, -1).tanh()

    assert audit(Scaled(), x_of()).entries == ()


def test_a_norm_after_relu_is_no_relu2() -> None:
    norm = Apply(lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())
    assert kinds(audit(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), norm), x_of())) == {"1": "relu"}


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_recurrent_layers_have_no_smooth_gate(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = audit(layer(8, 16), x_of())
    assert report.entries
    assert {entry.group for entry in report.entries} == {"other"}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_torch_encoder_is_not_taken_as_one_operation(activation: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True).eval()
    report = audit(nn.TransformerEncoder(layer, 2), x_of()[None])
    assert kinds(report) == {f"layers.{i}": activation for i in range(2)}


@torch.library.custom_op("audit_test::act", mutates_args=())
def custom_act(x: Tensor) -> Tensor:
    return F.gelu(x)


def test_operations_of_other_libraries_are_named() -> None:
    report = audit(network(lambda x: F.relu(custom_act(x))), x_of())
    assert report.opaque == ("audit_test::act",)
    assert "not seen into: audit_test::act" in str(report)


def test_a_relu_that_is_written_over_is_no_relu2() -> None:
    assert kind_of(lambda x: F.relu(x).add_(x).pow(2)) == "relu"


def test_the_inputs_are_not_written_into() -> None:
    x = x_of()
    assert audit(nn.ReLU(inplace=True), {"input": x}).is_relu
    assert torch.equal(x, x_of())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(attention: str, dtype: torch.dtype) -> None:
    model = tiny.build("clip", attn_implementation=attention).to(dtype)
    assert audit(model).counts == {"quick_gelu": 4}


def test_zeros_are_counted_over_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x).sum() + self.act(torch.ones(8)).sum()

    (entry,) = audit(Twice(), torch.tensor([-1.0] * 6 + [1.0] * 18)).entries
    assert (entry.name, entry.calls, entry.zeros) == ("act", 2, 6 / 32)


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_a_shared_module_goes_by_the_name_that_is_used() -> None:
    act = nn.GELU()
    report = audit(nn.Sequential(Block(act), Block(act), Block(nn.ReLU())), x_of())
    assert kinds(report) == {"0.act": "gelu", "1.act": "gelu", "2.act": "relu"}
    assert not report.unreached


class FunctionalExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ReLU(), nn.GELU(), FunctionalExpert(), Apply(FORMULAS["quick"][1]), nn.Softmax()])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def test_experts_that_no_token_reaches_are_listed() -> None:
    report = audit(Experts(), x_of())
    assert report.is_relu
    assert report.unreached == (("experts.1", "GELU"), ("experts.2", "F.gelu(self.linear(x))"), ("experts.3", "Apply"))
    assert "3 not reached" in str(report)


def test_report() -> None:
    model = tiny.build("bert-classifier")
    report = audit(model, tiny.inputs(model))
    text = str(report)
    assert "3 activations: 2 smooth" in text
    assert "2 × bert.encoder.layer.*.intermediate.intermediate_act_fn, 2 calls" in text
    record = json.loads(json.dumps(report.to_dict()))
    assert record["model"] == "BertForSequenceClassification"
    assert record["counts"] == {"gelu": 2, "tanh": 1}
    assert record["is_relu"] is False
    assert [entry["group"] for entry in record["entries"]] == ["smooth", "smooth", "other"]
    assert [entry.name for entry in report.smooth] == [entry["name"] for entry in record["entries"][:2]]


def test_folder(tmp_path: Path) -> None:
    model = tiny.build("bert-classifier")
    convert(model)
    model.save_pretrained(tmp_path / "soft")
    relu_ize(model, force=True)
    model.save_pretrained(tmp_path / "relu")
    state = torch.get_rng_state()
    assert audit(str(tmp_path / "soft")).counts == {"lambda_gelu": 2, "tanh": 1}
    report = audit(tmp_path / "relu")
    assert torch.equal(torch.get_rng_state(), state)
    assert (report.model, report.counts) == ("BertForSequenceClassification", {"relu": 2, "tanh": 1})
    assert report.is_relu


def test_folder_without_architectures(tmp_path: Path) -> None:
    tiny.build("llama").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = audit(tmp_path)
    assert (report.model, report.counts) == ("LlamaModel", {"silu": 2})


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_as_before(fails: bool) -> None:
    def noisy(x: Tensor) -> Tensor:
        torch.randn(3)
        random.random()
        np.random.seed(0)
        if fails:
            raise RuntimeError("on purpose")
        return x

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.BatchNorm1d(8), Apply(noisy), nn.ReLU(inplace=True))
    model[2].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.grad = torch.ones(8, 8)
    x = x_of()
    kept = x.clone()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if fails:
        with pytest.raises(ValueError, match=r"Sequential\.forward raised RuntimeError: on purpose.*inputs="):
            audit(model, x)
    else:
        assert audit(model, x).is_relu
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert sum(hooks(model)) == 0
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, kept)
    assert torch.is_grad_enabled()


def test_activations_are_not_kept() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def first(x: Tensor) -> Tensor:
        gate, hard = torch.sigmoid(x), F.relu(x)
        seen.extend([weakref.ref(gate), weakref.ref(hard)])
        return gate + hard

    def later(x: Tensor) -> Tensor:
        alive.extend(ref() is not None for ref in seen)
        return x

    alive: list[bool] = []
    audit(nn.Sequential(Apply(first), Apply(later)), x_of())
    assert alive == [False, False]


def test_inputs_of_every_form() -> None:
    model = Apply(lambda x, y: F.gelu(x) + F.relu(y))
    for inputs in [(x_of(), x_of()), [x_of(), x_of()]]:
        assert audit(model, inputs).counts == {"gelu": 1, "relu": 1}
    named = tiny.build("bert")
    assert audit(named, {**tiny.inputs(named), "labels": torch.zeros(2, 11, dtype=torch.long)}).counts == {"gelu": 3}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="module or the folder of a checkpoint, got int"):
        audit(3)
    with pytest.raises(ValueError, match=r"Linear is no transformers model: pass inputs="):
        audit(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="inputs is a int: expected a mapping"):
        audit(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"no model could be loaded from .*Expected a folder with config\.json"):
        audit(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        audit(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
    compiled = nn.Sequential(nn.GELU())
    compiled.compile()
    with pytest.raises(ValueError, match="the model is compiled"):
        audit(compiled, torch.zeros(1, 2))
    model = tiny.build("bert")
    model.main_input_name = "what_is_this"
    with pytest.raises(ValueError, match=r"no inputs can be guessed for BertForMaskedLM.*Pass inputs="):
        audit(model)
    with pytest.raises(ValueError, match=r"BertForMaskedLM\.forward raised ValueError: You must specify.*Pass inputs="):
        audit(model, {"nonsense": torch.zeros(1)})
