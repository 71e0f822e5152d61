"""The refit again, slowly: every row from forwards of the whole model, least squares by numpy in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit.ridge import RIDGES
from scripts.differential.conditions import Case, quiet_random
from scripts.differential.decisions import RIDGE, Decision, Map
from scripts.differential.rows import Rows, Seen, gates, joined, look, rows_of

Array = NDArray[np.float64]
HELD_OUT = 5  # one example in so many is judged by


@dataclass
class Found:
    """How far the engine is from the reference.

    Attributes:
        distance: the largest |Δ − Δ'| of a site's weights and biases, in units of the largest |Δ'|.
        site: where.
        rounding: how far numpy's normal equations in float32 are from it there.
        rows, padding: of all sites.
        faults: what is wrong otherwise: rows that were counted, a choice that is not the best.
        untold: sites whose padding the reference cannot tell.
    """

    distance: float = 0.0
    site: str = ""
    rounding: float = 0.0
    rows: int = 0
    padding: int = 0
    faults: tuple[str, ...] = ()
    untold: int = 0


class Reference:
    """The model of before, whose weights become the engine's final ones site after site."""

    def __init__(self, before: nn.Module, final: dict[str, Tensor], case: Case, decoder: set[str]) -> None:
        self.final, self.case, self.decoder = final, case, decoder
        self.smooth = before
        _give_biases(self.smooth, final)
        self.hard = copy.deepcopy(self.smooth)
        self.smooth_sites, self.hard_sites = (dict(hlg.hardness_sites(m)) for m in (self.smooth, self.hard))
        if case.own_wrap:
            self.run_smooth, self.run_hard = case.wrap(self.smooth), case.wrap(self.hard)
        else:
            self.run_smooth, self.run_hard = self.smooth, self.hard
        self.examples = sum(batch.size for batch in case.batches)

    def compare(self, decisions: list[Decision]) -> Found:
        """Site after site, in the engine's order."""
        found = Found()
        touched: set[str] = set()
        for decision in decisions:
            every = [self.rows(decision, index) for index in range(len(self.case.batches))]
            if self.case.exact and not self._follows(decision):
                found.faults += (f"{decision.maps[0].weight} does not take up the output of {decision.site}",)
            for number, linear in enumerate(decision.maps):
                parts = [found_rows[number] for found_rows in every if number in found_rows]
                self._judge(found, decision, linear, parts)
            for linear in decision.maps:
                for name in (linear.weight, linear.bias):
                    if name is not None:
                        touched.add(name)
                        self.hard.get_parameter(name).data.copy_(self.final[name])
        for name, value in self.hard.state_dict().items():
            other = self.final.get(name)
            if name not in touched and other is not None and not torch.equal(value, other):
                found.faults += (f"{name} was changed, and belongs to no site",)
        return found

    # ----------------------------------------------------------------------------------------------- rows of a batch

    def rows(self, decision: Decision, index: int) -> dict[int, tuple[Rows, Tensor, Tensor]]:
        """By number of the map: its rows in the substituted network, what it should add, and the wanted output."""
        case, batch = self.case, self.case.batches[index]
        stream = decision.scale is not None
        if decision.pooled:
            given, wanted = self._pooled(decision, index)
        else:
            given = self._look(
                self.run_hard, self.hard, self.hard_sites, decision, index, decision.hard | {decision.site}, stream
            )
            if stream:
                wanted = self._look(self.run_smooth, self.smooth, self.smooth_sites, decision, index, set(), stream)
            else:
                wanted = self._look(self.run_hard, self.hard, self.hard_sites, decision, index, decision.hard, stream)
        result = {}
        for number, linear in enumerate(decision.maps):
            if number not in given.calls:
                continue
            in_decoder = any(linear.weight.startswith(f"{name}.") for name in self.decoder)
            now, aim = (rows_of(s.calls.get(number, []), batch, linear, case.chunked, in_decoder) for s in (given, wanted))
            change = aim.outputs.double() - now.outputs.double()
            if stream:
                after, before = (self._stream(seen, decision, index) for seen in (wanted, given))
                change = (after - before) / decision.scale
                change = torch.where(decision.scale.abs() > 1e-12, change, 0.0)
            result[number] = now, change, aim.outputs.double()
        return result

    def _look(
        self,
        run: Callable[..., Any],
        model: nn.Module,
        sites: Any,
        decision: Decision,
        index: int,
        hard: set[str],
        stream: bool,
    ) -> Seen:
        inputs = self.case.batches[index].inputs
        with gates(sites, hard), self.case.context(), quiet_random():
            return look(lambda: run(**inputs), model, decision, stream)

    def _follows(self, decision: Decision) -> bool:
        """Whether the map's input is affine in the site's output: no other weights and nothing but a norm lie between.

        The output is scaled beyond a norm's ε. What lies behind the map must not matter, so the first call counts.
        """
        site, seen = self.smooth_sites[decision.site], []
        plain = type(site).forward
        for factor in (1e3, 2e3, 3e3):
            site.forward = lambda x, factor=factor: factor * plain(site, x)  # type: ignore[method-assign]
            try:
                with quiet_random():
                    run = look(lambda: self.run_smooth(**self.case.batches[0].inputs), self.smooth, decision, False)
            finally:
                vars(site).pop("forward", None)
            seen.append({number: calls[0].given.double() for number, calls in run.calls.items()})
        first, second, third = seen
        for number in first.keys() & second.keys() & third.keys():
            a, b, c = (found[number] for found in (first, second, third))
            if a.shape == b.shape == c.shape and float((a - 2 * b + c).norm()) > 1e-3 * float(c.norm() + 1e-30):
                return False
        return True

    def _pooled(self, decision: Decision, index: int) -> tuple[Seen, Seen]:
        """On the states of the smooth network: at each call of the block, it is also run with the refit weights."""
        sites, hard_block = self.hard_sites, self.hard.get_submodule(decision.block)
        found = Seen(), Seen()

        def again(module: nn.Module, args: Any, kwargs: Any) -> None:
            for seen, hard in zip(found, (decision.hard | {decision.site}, decision.hard), strict=True):
                with gates(sites, hard):
                    more = look(lambda: hard_block(*args, **kwargs), self.hard, decision, False)
                for number, calls in more.calls.items():
                    seen.calls.setdefault(number, []).extend(calls)

        block = self.smooth.get_submodule(decision.block)
        handle = block.register_forward_pre_hook(again, with_kwargs=True)
        try:
            with torch.no_grad(), self.case.context(), quiet_random():
                self.run_smooth(**self.case.batches[index].inputs)
        finally:
            handle.remove()
        return found

    def _stream(self, seen: Seen, decision: Decision, index: int) -> Tensor:
        """What is at the meeting point, as rows in float64."""
        tensors = [tensor.movedim(1, -1) if decision.moved else tensor for tensor in seen.stream.values()]
        if self.case.chunked and len(tensors) > 1:
            tensors = joined(tensors, self.case.batches[index])
        return torch.cat([tensor.reshape(-1, tensor.shape[-1]).double() for tensor in tensors])

    # -------------------------------------------------------------------------------------------------- least squares

    def _judge(self, found: Found, decision: Decision, linear: Map, parts: list[Any]) -> None:
        first, kept, fits = 0, [], []
        for index, (rows, _, _) in enumerate(parts):
            part = rows.part // -(-rows.total // HELD_OUT) if self.examples <= 1 else rows.example
            fits.append(rows.token & ((first + part) % HELD_OUT != 0))
            kept.append(rows.token)
            first += self.case.batches[index].size
            found.rows += int(rows.token.sum())
            found.padding += int((~rows.token).sum())
            found.untold += not rows.told
        before, after = (self._weight(state, linear) for state in (self.hard.state_dict(), self.final))
        counted = sum(int(k.sum()) for k in kept)
        where = f"{decision.site} → {linear.weight}" + ("" if linear.index is None else f"[{linear.index}]")
        if counted != linear.rows:
            found.faults += (f"{where}: {linear.rows} rows were counted, there are {counted}",)
        if linear.method == "none" and not all(map(np.array_equal, before, after)):
            found.faults += (f"{where}: changed where nothing was decided",)
        if not parts or not counted:
            return
        r, e = (np.concatenate([_numpy(p[i])[k.numpy()] for p, k in zip(_pairs(parts), kept, strict=True)]) for i in (0, 1))
        fit = np.concatenate([f.numpy()[k.numpy()] for f, k in zip(fits, kept, strict=True)])
        biased = linear.bias is not None
        got = [(linear.method, linear.ridge, (after[0] - before[0], after[1] - before[1]))]
        if linear.solved is not None:  # from the same sums, where little data makes something simpler the better choice
            got.append(("least_squares", RIDGE, (linear.solved[0].numpy(), linear.solved[1].numpy())))
        for method, ridge, (given_weight, given_bias) in got:
            weight, bias = solution(r, e, method, ridge, biased)
            distance = max(_apart(given_weight, weight), _apart(given_bias, bias) if biased else 0.0)
            if not distance <= found.distance:
                found.distance, found.site = distance, where
                found.rounding = _apart(in_float32(r, e, ridge, biased), weight) if method == "least_squares" else 0.0
        if fit.all() or not fit.any():
            return
        found.faults += self._choice(where, r, e, fit, decision, linear)

    def _choice(self, where: str, r: Array, e: Array, fit: Any, decision: Decision, linear: Map) -> tuple[str, ...]:
        """Whether the held-out rows choose what was chosen; equal ones may be confused."""
        scale = np.ones(e.shape[1]) if decision.scale is None else decision.scale.numpy()
        biased = linear.bias is not None
        candidates: list[tuple[str, float | None]] = [("none", None), ("bias", None)] + [
            ("least_squares", x) for x in RIDGES
        ]
        errors = {}
        for name, ridge in candidates:
            weight, bias = solution(r[fit], e[fit], name, ridge, biased)
            errors[name, ridge] = float(np.square((e[~fit] - r[~fit] @ weight - bias) * scale).sum())
        best = min(errors.values())
        if errors[linear.method, linear.ridge] > best * (1.0 + 1e-2) + 1e-30:
            return (f"{where}: {linear.method} with ridge {linear.ridge} is not the best on the held-out rows",)
        return ()

    def _weight(self, state: dict[str, Tensor], linear: Map) -> tuple[Array, Array]:
        weight = state[linear.weight] if linear.index is None else state[linear.weight][linear.index]
        weight = weight if linear.transposed else weight[linear.outputs].flatten(1).T
        bias = np.zeros(weight.shape[1]) if linear.bias is None else _numpy(state[linear.bias][linear.outputs])
        return _numpy(weight), bias if linear.gain is None else bias / _numpy(linear.gain[linear.outputs])


def solution(r: Array, e: Array, method: str, ridge: float | None, biased: bool) -> tuple[Array, Array]:
    """(W, b) that minimise |e − r W − b|² + ridge · mean eigenvalue of the features' scatter · |W|²."""
    nothing = np.zeros((r.shape[1], e.shape[1])), np.zeros(e.shape[1])
    if method == "none" or not len(r):
        return nothing
    mean_r, mean_e = (r.mean(0), e.mean(0)) if biased else (np.zeros(r.shape[1]), nothing[1])
    if method == "bias":
        return nothing[0], mean_e
    assert ridge is not None
    centred, wanted = r - mean_r, e - mean_e
    mean = np.square(centred).sum() / r.shape[1]
    penalty = ridge * mean if mean > 0 else 1.0
    # as plain least squares: the ridge is rows more
    rows = np.concatenate([centred, np.sqrt(penalty) * np.eye(r.shape[1])])
    aims = np.concatenate([wanted, np.zeros((r.shape[1], e.shape[1]))])
    weight = np.linalg.lstsq(rows, aims, rcond=None)[0]
    return weight, mean_e - mean_r @ weight


def in_float32(r: Array, e: Array, ridge: float | None, biased: bool) -> Array:
    """The same W from sums in float32: what rounding alone makes of few rows, or of a small ridge."""
    assert ridge is not None
    r32, e32 = r.astype(np.float32), e.astype(np.float32)
    if biased:
        r32, e32 = r32 - r32.mean(0), e32 - e32.mean(0)
    gram = r32.T @ r32
    penalty = np.float32(ridge * np.trace(gram) / len(gram) or 1.0)
    weight: Array = np.linalg.solve(gram + penalty * np.eye(len(gram), dtype=np.float32), r32.T @ e32)
    return weight.astype(np.float64)


def _apart(one: Array, other: Array) -> float:
    """The largest |difference|, in units of the largest element of the second; of the first where that is nothing."""
    reach = float(np.abs(other).max()) or float(np.abs(one).max()) or 1.0
    return float(np.abs(one - other).max()) / reach


def _pairs(parts: list[Any]) -> list[tuple[Tensor, Tensor]]:
    return [(rows.inputs, change) for rows, change, _ in parts]


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def _give_biases(model: nn.Module, final: dict[str, Tensor]) -> None:
    """Biases of zero where the refit model has some and this one has none."""
    for name in final.keys() - model.state_dict().keys():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            module = model.get_submodule(owner)
            module.bias = nn.Parameter(torch.zeros_like(final[name]))
