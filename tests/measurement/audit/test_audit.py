"""What a model runs, against its modelling code read by hand; the report; the model and the random state are as before."""

from __future__ import annotations

import json
import random
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.audited import Apply, kinds, x_of
from support.versions import OLDER_TRANSFORMERS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from hf_lambda_gelu import convert, gates_as_relu, relu_ize
from hf_lambda_gelu.measurement.audit.audit import audit

ARCHITECTURES = ["bert", "bert-classifier", "roberta", "distilbert", "albert", "deberta-v2", "vit", "clip"]
ARCHITECTURES += ["gpt2", "whisper", "wav2vec2", "t5", "gemma2", "llama"]
# kinds that no table in tests/support/tiny.py holds: tanh poolers and soft caps
# of Gemma 2's attention, tanh is seen where it is computed in the open; older versions leave it to torch's attention
EXTRA = {"bert-classifier": {"tanh": 1}, "gemma2": {"tanh": 1 if OLDER_TRANSFORMERS else 3}}
# functional calls; both of whisper's are in one module
FUNCTIONAL = {"roberta": 1, "deberta-v2": 1, "whisper": 1}


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
        self.experts = nn.ModuleList(
            [nn.ReLU(), nn.GELU(), FunctionalExpert(), Apply(lambda x: x * torch.sigmoid(1.702 * x)), nn.Softmax()]
        )

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
    with pytest.raises(ValueError, match=r"no model could be loaded from .*expected the folder of a saved checkpoint"):
        audit(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        audit(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
    compiled = nn.Sequential(nn.GELU())
    compiled.compile()
    with pytest.raises(ValueError, match="the model is compiled"):
        audit(compiled, torch.zeros(1, 2))
    model = tiny.build("bert")
    model.main_input_name = "what_is_this"  # the architecture's inputs serve then, but for wrong weights
    assert audit(model).smooth
    model.bert.embeddings.word_embeddings = nn.Embedding(99, 7)
    with pytest.raises(ValueError, match=r"no inputs can be guessed for BertForMaskedLM.*Pass inputs="):
        audit(model)
    model = tiny.build("bert")
    with pytest.raises(ValueError, match=r"BertForMaskedLM\.forward raised ValueError: You must specify.*Pass inputs="):
        audit(model, {"nonsense": torch.zeros(1)})
