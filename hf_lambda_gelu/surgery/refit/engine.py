"""Substitution that repairs itself: the linear map after each activation is refit so that ReLU does not shift the stream.

Replacing f by ReLU changes a site's output by D W2ᵀ with D = f(z) − ReLU(z), whose mean is far from zero. From unlabelled
data, the linear map W2, b2 is refit in closed form (ridge regression), site after site in network order, each on what the
network as substituted so far computes. The target is what the smooth network's residual stream holds at the point where the
map's output has been added to it, so that drift from earlier sites is corrected too; where a block has no such point, it is
what the smooth gate would have given here. All of it is derived, not the paper's (arXiv 2603.21991).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...measurement.batches import CalibrationError, check_dealt, model_batches
from ...measurement.forward import main_output
from ...measurement.site_rows import positions_first
from ...measurement.team import ALONE, Team
from ...reports import length, progress
from ...structure.linear_maps import LinearMap, eager_experts
from ...structure.scratch import scratch_folder
from ...structure.tracing import Trace, trace
from .capture import Sample
from .chain_walk import ChainWalk, DependentError
from .chains import Chain, find_chains
from .evidence import Evidence, MeetingError
from .held_out import Verdict, decide
from .meeting_point import Meeting, observe
from .norm_biases import borrow_biases
from .pruned import support
from .refit_shards import refit_weights
from .report import FEW_ROWS, Compensate, CompensatedSite, CompensationReport, describe
from .ridge import Correction
from .row_weights import RowWeights
from .runs import ReplayError
from .two_networks import Network, TwoNetworks
from .wider import Wider

logger = logging.get_logger(__name__)


class Refit:
    """Refits the maps after the activations, site after site. `networks.undo` takes all of it back."""

    def __init__(self, networks: TwoNetworks, wider: Wider | None = None) -> None:
        self.networks, self.wider = networks, wider
        self._positions_first: Collection[str] = ()

    @property
    def originals(self) -> dict[nn.Parameter, Tensor]:
        """The parameters that were refit, with what they were."""
        return self.networks.originals

    def run(self, method: Compensate, biases: bool = True) -> CompensationReport:
        """Refit site after site. On return the model holds the refit weights and its λ-GELUs still compute their λ.

        Args:
            biases: whether maps without a bias are given one, where a config attribute can.
        """
        start = time.perf_counter()
        networks = self.networks
        with eager_experts(networks.model), networks.autocast.off.entered():
            traced, chains = self._look(biases, report := CompensationReport(), method)
            report.uncompensated.update(traced.obstacles)
            with torch.no_grad():
                for site in progress(self._refit_all(chains, traced, method), "Refitting", len(traced.maps)):
                    report.sites.append(site)
        networks.hard = set(networks.sites)
        order = {name: index for index, name in enumerate(networks.sites)}
        report.sites.sort(key=lambda site: order[site.name])
        report.seconds = time.perf_counter() - start
        few = [site.name for site in report.sites if FEW_ROWS in site.note]
        if few and networks.team.leads:
            logger.warning(
                f"{len(few)} of {len(report.sites)} sites were refit from few rows for their effective rank, {few[0]} the "
                "first of them: more calibration data would do better"
            )
        return report

    def rehearse(self) -> dict[str, str]:
        """Does what comes before the solving, on the calibration set; what `run` will leave uncompensated, and why."""
        with eager_experts(self.networks.model), self.networks.autocast.off.entered():
            traced, _ = self._look(False, CompensationReport(), "least_squares")
        return dict(traced.obstacles)

    def _look(self, biases: bool, report: CompensationReport, method: Compensate) -> tuple[Trace, list[Chain]]:
        """Where the maps are and the chains that the sites are refit along; what will be wider; maps are given biases.

        Every process of a team runs the same batches here, so that all find the same.
        """
        networks = self.networks
        others = [networks.forward_of_all(number) for number in range(1, len(networks.batches.deal.order))]
        outputs: list[Sample | None] = []  # of the smooth network on the first batch, run after run
        first = networks.forward_of_all(0)

        def run_first() -> Any:
            output = first()
            outputs.append(Sample.of(main_output(output)))
            return output

        with networks.smooth():
            traced = trace(networks.model, run_first, *others)
        wanting, needed = [m for maps in traced.maps.values() for m in maps], list[LinearMap]()
        if self.wider is not None:
            more, needed = self.wider.plan(lambda: [networks.forward_of_all(number)() for number in traced.batches])
            wanting += more
        if biases:
            report.bias_attribute = networks.biases.add(wanting, needed)
        if self.wider is not None:
            self.wider.check(traced, method)
        refit = [p for maps in traced.maps.values() for m in maps for p in (m.parameter, m.bias) if p is not None]
        networks.expect({p: tuple(p.shape) for p in refit} | ({} if self.wider is None else self.wider.shapes()))
        with networks.smooth(), torch.no_grad():
            maps = {site: traced.maps[site] for site in traced.order if site in traced.maps}
            chains = find_chains(networks.model, run_first, maps, *(others[number - 1] for number in traced.batches[1:]))
            if biases:
                borrow_biases(networks.model, wanting, first)
            if not _alike(*outputs):  # with and without a graph, perhaps by kernels that round otherwise
                self._check_repeats()
            self._positions_first = self._turned(traced)
        labels = {site: [(linear.label, linear.bias is not None) for linear in found] for site, found in maps.items()}
        networks.team.same((labels, traced.obstacles, chains), "what is to be refit")
        return traced, chains

    def _check_repeats(self) -> None:
        """CalibrationError if the smooth network puts out something else each time: then there is nothing to compare."""
        if not _alike(*(Sample.of(main_output(self.networks.forward_of_all(0)())) for _ in range(2))):
            raise CalibrationError(
                f"{type(self.networks.model).__name__}.forward puts out something else each time it runs on calibration "
                "batch 0. Switch off what keeps state from run to run, or draws random numbers of its own"
            )

    def _turned(self, traced: Trace) -> Collection[str]:
        """The sites that work on (positions, examples, …); a run on one example less shows them."""
        networks, size = self.networks, self.networks.batches.deal.size(0)
        second = {s: leading for s, leading in traced.leading.items() if len(leading) > 1 and leading[1] == size > 1}
        doubtful: dict[nn.Module, Sequence[int]] = {
            networks.sites[site]: leading for site, leading in second.items() if site in traced.maps
        }
        with networks.autocast.entered():
            turned = positions_first(networks.model, doubtful, networks.batches.shown(0), size) if doubtful else ()
        return {site for site in second if networks.sites[site] in turned}

    def _refit_all(self, chains: list[Chain], traced: Trace, method: Compensate) -> Iterator[CompensatedSite]:
        queue = deque(chains)
        while queue:
            chain = queue.popleft()
            self.networks.hard |= _uncompensated_before(traced, chain)
            left = [site for sites in chain.sites for site in sites]
            try:
                walk = ChainWalk(self.networks, chain)
                for step, sites in enumerate(chain.sites):
                    earlier = self._earlier(sites)
                    done: list[CompensatedSite] = []
                    shifted: list[str] = []
                    with self.networks.holding(self._weights(walk, sites, traced)):
                        for made in self._refit_each(walk, sites, traced, method) if earlier is None else earlier:
                            self.networks.hard.add(made.name)
                            left.remove(made.name)
                            done.append(made)
                            yield made
                        if step + 1 < len(chain.sites):
                            shifted = walk.advance()
                    if earlier is None:
                        noted = {} if self.wider is None else self.wider.note(sites)
                        self.networks.note_done(sites, done, shifted, noted)
                    else:
                        self.networks.take_states(sites)
            except DependentError:
                queue.extendleft(reversed(chain.split()))
            except ReplayError as error:
                logger.info(f"{chain.blocks[0]} … {chain.blocks[-1]} cannot be run apart from the model ({error})")
                queue.extendleft([Chain([""], [left])] if left else [])

    def _earlier(self, sites: Sequence[str]) -> list[CompensatedSite] | None:
        """What a killed process did in the block with these sites; None if nothing."""
        earlier = self.networks.done_earlier(sites)
        if earlier is None:
            return None
        made, noted = earlier
        if self.wider is not None:
            self.wider.resume(noted)
        return made

    def _weights(self, walk: ChainWalk, sites: Iterable[str], traced: Trace) -> Iterable[nn.Parameter]:
        """What stays in memory while a block is worked on: its weights; of the whole model, those around the sites alone."""
        if not walk.whole:
            return walk.block.parameters()
        maps = [linear for site in sites for linear in traced.maps[site]]
        maps += [] if self.wider is None else [linear for site in sites for linear in self.wider.around(site)]
        return [p for linear in maps for p in (linear.parameter, linear.bias) if p is not None]

    def _refit_each(
        self, walk: ChainWalk, sites: Sequence[str], traced: Trace, method: Compensate
    ) -> Iterator[CompensatedSite]:
        for site in sites:
            yield self._refit(walk, site, traced.maps[site], method)

    def _refit(self, walk: ChainWalk, site: str, maps: list[LinearMap], method: Compensate) -> CompensatedSite:
        """Refit the maps after one site, of a layer that is wider by then if it shall be."""
        if self.wider is not None:
            self.wider.widen(walk, site, site in self._positions_first)
        evidence, team = self._evidence(walk, site, maps), self.networks.team
        team.led(evidence.check_finite, f"whether the sums of {site} are finite")
        verdicts = []
        for linear in maps:
            decided = partial(self._decided, linear, evidence, method)
            correction, verdict = team.led(decided, f"what {linear.label} gets")
            self.networks.correct(linear, correction)
            walk.correct(correction, evidence.meeting)
            verdicts.append(verdict)
        target = "local" if evidence.meeting is None else "stream"
        biased = all(linear.bias is not None for linear in maps)
        described = partial(describe, site, maps[0].name, target, verdicts, evidence, biased)
        return team.led(described, f"the report of {site}")

    @staticmethod
    def _decided(linear: LinearMap, evidence: Evidence, method: Compensate) -> tuple[Correction, Verdict]:
        fit, held_out = evidence.sums[linear.label]
        biased, kept = linear.bias is not None, support(linear)
        return decide(fit, held_out, method, biased=biased, scale=evidence.scale, kept=kept)

    def _evidence(self, walk: ChainWalk, site: str, maps: list[LinearMap]) -> Evidence:
        """What a refit of the maps needs; on the smooth gate's own output where the stream is not there on every batch."""
        single = walk.aligned and not walk.pooled and len(maps) == 1 and maps[0].index is None
        meeting = walk.find_meeting(maps[0]) if single else None
        if not single:
            walk.prove()
        try:
            return self._gather(walk, site, maps, meeting)
        except MeetingError:
            if meeting is None:
                raise CalibrationError(
                    f"{site}: the map after it gets other rows when this gate is ReLU, so that nothing can be compared"
                ) from None
            return self._gather(walk, site, maps, None)

    def _gather(self, walk: ChainWalk, site: str, maps: list[LinearMap], meeting: Meeting | None) -> Evidence:
        """Run the block as both networks over the calibration set, and gather what a refit of the maps needs."""
        team, batches = self.networks.team, self.networks.batches
        evidence = Evidence(site, maps, meeting, site in self._positions_first)
        evidence.weigh = None if self.wider is None else RowWeights()
        walk.forget_given()
        left = range(batches.count)
        if evidence.weigh is not None:  # all rows are weighed by the first ones
            with team.together(MeetingError, ReplayError):
                self._add(evidence, walk, batches.head)
            evidence.weigh.reference = team.given(batches.deal.leader, evidence.weigh.reference, f"weights of {site}")
            left = batches.rest
        with team.together(MeetingError, ReplayError):
            self._add(evidence, walk, left)
        evidence.finish(team)
        return evidence

    def _add(self, evidence: Evidence, walk: ChainWalk, own: Iterable[int]) -> None:
        """Let the evidence have the rows of some of the own batches."""
        networks, site, maps, meeting = self.networks, evidence.site, evidence.maps, evidence.meeting
        for index in own:
            smooth_runs = walk.runs(Network.SMOOTH, index) if walk.pooled or meeting is not None else []
            hard_runs = smooth_runs if walk.pooled else walk.runs(Network.SUBSTITUTED, index)
            for place, run in enumerate(hard_runs):
                changed = replace(run, sample=None)
                with networks.substituted(site):
                    given = observe(changed, maps, meeting, networks.sites[site])
                if meeting is None:  # the same state, with this gate smooth
                    with networks.substituted():
                        wanted = observe(changed, maps)
                else:
                    with networks.smooth():
                        wanted = observe(smooth_runs[place], maps, meeting)
                    walk.keep_next(Network.SMOOTH, index, wanted.hidden)
                    walk.keep_given(index, given, maps[0], meeting)
                if given.gated and not given.calls:
                    raise CalibrationError(
                        f"calibration batch {index}: {site} runs, but not {maps[0].name}, which takes up its output on "
                        "another batch. Let every batch hold the same inputs, or leave out those that differ"
                    )
                evidence.add(given, wanted, networks.batches.examples(index))


def _alike(first: Sample | None, second: Sample | None) -> bool:
    return first is None or first.matches(second)


@contextmanager
def compensation(
    model: nn.Module,
    loader: Iterable[Any],
    wider: Callable[[TwoNetworks], Wider] | None = None,
    team: Team = ALONE,
) -> Iterator[Refit]:
    """A `Refit` that has the calibration set; the model is as it was if the block raises.

    Args:
        wider: makes what lets layers be wider; None for layers as they are.
        team: the processes that refit together, within `whole`; the loader has this one's share.
    """
    with scratch_folder() as folder:
        networks = TwoNetworks(model, folder, refit_weights(model, folder, team.all_did), team)
        try:
            check_dealt(loader, team)
            batches = model_batches(model, loader, team)
            networks.batches.keep(progress(batches, "Reading the calibration set", length(loader)))
            if networks.weights is not None:
                networks.weights.read_journal()
            yield Refit(networks, None if wider is None else wider(networks))
            networks.leave()
            networks.commit()
        except BaseException:
            networks.undo()
            raise


def _uncompensated_before(traced: Trace, chain: Chain) -> set[str]:
    """Sites that come before the chain and are not refit: ReLU too by the time that the chain's turn comes."""
    first = min(traced.order.index(site) for sites in chain.sites for site in sites)
    return {name for name in traced.order[:first] if name in traced.obstacles}
