"""Substitution that repairs itself: the linear map after each activation is refit so that ReLU does not shift the stream.

Replacing f by ReLU changes a site's output by D W2ᵀ with D = f(z) − ReLU(z), whose mean is far from zero. From unlabelled
data, the linear map W2, b2 is refit in closed form (ridge regression), site after site in network order, each on what the
network as substituted so far computes. The target is what the smooth network's stream holds at the point where the map's
output has been added to it, so that drift from earlier sites is corrected too; where a block has no such point, it is what
the smooth gate would have given here. All of it is derived, not the paper's (arXiv 2603.21991).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...measurement.batches import CalibrationError, batch_size, model_batches, token_mask
from ...measurement.forward import decoder_modules
from ...structure.linear_maps import LinearMap, eager_experts
from ...structure.tracing import Trace, trace
from .blocks import Chain, plan
from .meeting_point import Meeting, Observed, find_meeting, observe
from .report import Compensate, CompensatedSite, CompensationReport, _summary
from .ridge import Moments, choose, effective_rank, solve
from .two_networks import Twin

logger = logging.get_logger(__name__)
# one example in so many is held out to judge by
_HELD_OUT = 5
# above this ratio of parameters in effect to rows, a fit is expected to err by as much more on new data
_RANK_WARNING = 0.25
_FEW = "few rows"


class Compensation(Twin):
    """Refits the maps after the activations, site after site. `undo` takes all of it back."""

    def run(self, method: Compensate, biases: bool = True) -> CompensationReport:
        """Refit site after site. On return the model holds the refit weights and its λ-GELUs still compute their λ.

        Args:
            biases: whether maps without a bias are given one, where a config attribute can.
        """
        start = time.perf_counter()
        with eager_experts(self.model):
            traced = trace(self.model, self.forward(0))
            report = CompensationReport(uncompensated=dict(traced.obstacles))
            if biases:
                report.bias_attribute = self.give_biases(m for maps in traced.maps.values() for m in maps)
            with torch.no_grad():
                for chain in self._chains(traced):
                    self.hard |= self._uncompensated_before(traced, chain)
                    for site in self._through(chain, traced, method):
                        report.sites.append(site)
        self.hard = set(self.sites)
        order = {name: index for index, name in enumerate(self.sites)}
        report.sites.sort(key=lambda site: order[site.name])
        report.seconds = time.perf_counter() - start
        few = [site.name for site in report.sites if _FEW in site.note]
        if few:
            logger.warning(
                f"{len(few)} of {len(report.sites)} sites were refit from few rows for their effective rank, {few[0]} the "
                "first of them: more calibration data would do better"
            )
        return report

    def _uncompensated_before(self, traced: Trace, chain: Chain) -> set[str]:
        """Sites that come before the chain and are not refit: ReLU too by the time that the chain's turn comes."""
        first = min(traced.order.index(site) for sites in chain.sites for site in sites)
        return {name for name in traced.order[:first] if name in traced.obstacles}

    def _chains(self, traced: Trace) -> list[Chain]:
        forward = self.forward(0)
        chains: list[Chain] = []
        for chain in plan(self.model, forward, {s: traced.maps[s] for s in traced.order if s in traced.maps}):
            chains += [chain] if self.independent(chain) else chain.split()
        return chains

    def _through(self, chain: Chain, traced: Trace, method: Compensate) -> Iterator[CompensatedSite]:
        self.enter(chain)
        for step, (block, sites) in enumerate(zip(chain.blocks, chain.sites, strict=True)):
            module = self.model.get_submodule(block)
            for site in sites:
                yield self._refit(chain, step, module, site, traced.maps[site], method)
                self.hard.add(site)
            if step + 1 < len(chain.blocks):
                self.advance(chain, step, module)

    def _refit(
        self, chain: Chain, step: int, module: nn.Module, site: str, maps: list[LinearMap], method: Compensate
    ) -> CompensatedSite:
        meeting = None
        if not chain.pooled and len(maps) == 1 and maps[0].index is None:
            with self.smooth():
                meeting = find_meeting(module, self.calls("smooth", 0, chain, step)[0], maps[0])
        sums = {m.label: (_empty(m), _empty(m)) for m in maps}
        norm = 0.0
        decoder = module in decoder_modules(self.model)
        examples = 0
        for index in range(self.count):
            batch = self.batch(index)
            size, mask = batch_size(self.model, batch), token_mask(batch, decoder)
            smooth_calls = self.calls("smooth", index, chain, step)
            hard_calls = smooth_calls if chain.pooled else self.calls("hard", index, chain, step)
            for smooth_call, hard_call in zip(smooth_calls, hard_calls, strict=True):
                with self.substituted(site):
                    hard = observe(module, hard_call, maps, meeting)
                if meeting is None:  # the same state, with this gate smooth
                    with self.substituted():
                        wanted = observe(module, hard_call, maps)
                else:
                    with self.smooth():
                        wanted = observe(module, smooth_call, maps, meeting)
                    self.keep_next("smooth", index, wanted.hidden)
                for m in maps:
                    several = self.examples > 1
                    norm += _take(m, hard, wanted, meeting, sums[m.label], mask, size, examples, several)
            examples += size
        return self._solve(site, maps, sums, norm, meeting, method)

    def _solve(
        self,
        site: str,
        maps: list[LinearMap],
        sums: dict[str, tuple[Moments, Moments]],
        norm: float,
        meeting: Meeting | None,
        method: Compensate,
    ) -> CompensatedSite:
        before = after = 0.0
        methods: list[str] = []
        rank: float | None = None
        notes: list[str] = []
        rows = starved = 0
        if not all(bool(torch.isfinite(s.ee.sum() + s.rr.sum())) for pair in sums.values() for s in pair):
            raise CalibrationError(
                f"{site}: what it puts out on the calibration batches, or the stream that it is added to, is not finite. "
                "Does the model overflow in half precision?"
            )
        for m in maps:
            fit, held_out = sums[m.label]
            rows += fit.count + held_out.count
            biased = m.bias is not None
            if not fit.count or not held_out.count:
                starved += 1
                methods.append("none")
                error = held_out.error(solve(held_out, "none"))
                before, after = before + error, after + error
                continue
            change, error, left = choose(fit, held_out, method, biased=biased, scale=meeting and meeting.scale)
            before, after = before + error, after + left
            methods.append(change.method)
            if change.ridge is not None:
                rank = max(rank or 0.0, effective_rank(fit + held_out, change.ridge, biased))
                if rank > _RANK_WARNING * (fit.count + held_out.count):
                    notes.append(f"{_FEW}: {fit.count + held_out.count} for an effective rank of {rank:.0f}")
            if change.method != "none":
                for parameter in (m.parameter, m.bias):
                    if parameter is not None and parameter not in self.originals:
                        self.originals[parameter] = parameter.data.clone()
                m.add(change.weight, change.bias)
        if not rows or starved == len(maps):
            notes.append("no rows to fit and to judge by: at least two examples that are not padding are needed")
        elif starved:
            notes.append(f"{starved} of {len(maps)} experts got too few tokens")
        if any(m.bias is None for m in maps):
            notes.append("weights only: the map has no bias")
        norm = max(norm, 1e-30)
        return CompensatedSite(
            site,
            maps[0].name,
            _summary(methods),
            "local" if meeting is None else "stream",
            rows,
            (before / norm) ** 0.5,
            (after / norm) ** 0.5,
            rank,
            "; ".join(dict.fromkeys(notes)),
        )


@contextmanager
def compensation(model: nn.Module, loader: Iterable[Any]) -> Iterator[Compensation]:
    """A `Compensation` with the calibration set taken in; the model is as it was if the block raises."""
    with tempfile.TemporaryDirectory(prefix="hf_lambda_gelu-") as folder:
        work = Compensation(model, Path(folder))
        try:
            work.take(model_batches(model, loader))
            yield work
        except BaseException:
            work.undo()
            raise
        finally:
            work._gates(set())


def _take(
    linear: LinearMap,
    hard: Observed,
    wanted: Observed,
    meeting: Meeting | None,
    sums: tuple[Moments, Moments],
    mask: Tensor | None,
    size: int,
    first: int,
    several: bool,
) -> float:
    """Add the rows of one call to the sums; Σ‖smooth output‖² over the held-out ones."""
    label = linear.label
    if label not in hard.inputs:  # an expert to which nothing was routed
        return 0.0
    features, output = hard.inputs[label], wanted.outputs[label]
    scale = None
    if meeting is None:
        change = output - hard.outputs[label]
    else:
        scale = meeting.scale
        change = torch.where(scale.abs() > 1e-12, (wanted.stream - hard.stream) / scale, 0.0)
    rows, total, leading = torch.arange(len(features), device=features.device), len(features), hard.leading[label]
    if linear.index is not None and hard.routing is not None:
        rows, total = torch.where((hard.routing == linear.index).T)[1], len(hard.routing)
    elif len(leading) > 1 and leading[0] != size == leading[1]:  # positions first, as XLNet has them
        rows = rows.view(size, leading[0], -1).transpose(0, 1).reshape(-1)
    keep = torch.ones_like(rows, dtype=torch.bool)
    if mask is not None and mask.numel() == total:
        keep = mask.reshape(-1).to(rows.device)[rows]
    per = total // size if total % size == 0 else 1  # rows an example
    if not several:
        per = -(-total // _HELD_OUT)  # a single example is judged by a part of itself
    held = (first + rows // per) % _HELD_OUT == 0
    for part, target in zip((keep & ~held, keep & held), sums, strict=True):
        target.add(features[part], change[part])
    judged = output[keep & held].double()
    return float((judged if scale is None else judged * scale).square().sum())


def _empty(linear: LinearMap) -> Moments:
    return Moments.empty(*linear.shape, linear.parameter.device)
