"""The refit in numpy and float64: ridge regressions on what plain hooks take from stock networks, site by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lambda_gelu.surgery.refit.ridge import RIDGES
from support.site_tables import ALBERT, Where, both

Array = NDArray[np.float64]
Batches = list[dict[str, Tensor]]


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
            module = model.get_submodule(name)
            taps = module if key.endswith("features") and isinstance(module, nn.Conv1d) else None

            def keep(value: Any, key: str = key, moved: bool = moved, taps: Any = taps) -> None:
                value = value[0] if isinstance(value, tuple) else value
                value = (value if taps is None else windows(taps, value)).movedim(1, -1) if moved else value
                self.seen[key].append(value.detach().double().reshape(-1, value.shape[-1]).numpy())

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


def windows(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """(batch, channels · kernel, positions): what a convolution multiplies at each position, by torch's im2col of images."""
    sizes = {name: (1, getattr(conv, name)[0]) for name in ("dilation", "stride")}
    return F.unfold(x[:, :, None], (1, conv.kernel_size[0]), padding=(0, conv.padding[0]), **sizes)


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
    """(W, b) that minimise |e − r W − b|² + ridge · mean eigenvalue · |W|², solved in float64."""
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
            meets = where.meeting[n % len(where.meeting)] if where.meeting and where.block != ALBERT else ""
            conv = isinstance(model.get_submodule(taker), nn.Conv1d)
            points = {"features": (taker, "in", conv), "output": (taker, "out", conv), "act": (name, "in", False)}
            if meets:
                inner = f"{block}.{meets}".strip(".")  # the model's own block has no name
                points["stream"] = (block, "out", where.moved) if meets == "output" else (inner, "in", where.moved)
            points_of[name] = points
    all_points = {f"{name} {key}": point for name, points in points_of.items() for key, point in points.items()}
    soft_all = Probe(smooth, batches, all_points)
    for where in wheres:
        for name, taker, block in zip(both(where.site), both(where.taker), both(where.block), strict=True):
            points, pooled = points_of[name], where.block == ALBERT
            soft = {key: soft_all[f"{name} {key}"] for key in points}
            network = relu(state)
            hard = Probe(network, batches, points)
            weight, bias = state[f"{taker}.weight"].double().numpy(), state.get(f"{taker}.bias")
            weight = weight if transposed else weight.reshape(len(weight), -1).T
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
            got = (got if transposed else got.reshape(len(got), -1).T) - weight
            shift = None if bias is None else (final[f"{taker}.bias"].double() - bias.double()).numpy()
            check(rows, scale, bias is not None, method, by_name[name], (got, shift))
            for part in ("weight", "bias"):
                if f"{taker}.{part}" in state:
                    state[f"{taker}.{part}"] = final[f"{taker}.{part}"].clone()
    changed = {k for k in state if not torch.equal(state[k], final[k])}
    assert changed == set()  # what no table names is as it was
