"""Substitution that repairs itself: the linear map after each activation is refit so that ReLU does not shift the stream.

Replacing f by ReLU changes a site's output by D W2ᵀ with D = f(z) − ReLU(z), whose mean is far from zero. From unlabelled
data, the linear map W2, b2 is refit in closed form (ridge regression), site after site in network order, each on what the
network as substituted so far computes. The target is what the smooth network's residual stream holds at the point where the
map's output has been added to it, so that drift from earlier sites is corrected too; where a block has no such point, it is
what the smooth gate would have given here. All of it is derived, not the paper's (arXiv 2603.21991).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...measurement.batches import batch_size, model_batches, token_mask
from ...measurement.forward import decoder_modules
from ...reports import length, progress
from ...structure.linear_maps import LinearMap, eager_experts
from ...structure.scratch import scratch_folder
from ...structure.tracing import Trace, trace
from .chain_walk import ChainWalk, is_independent
from .chains import Chain, find_chains
from .evidence import Evidence
from .held_out import Examples, decide
from .report import FEW_ROWS, Compensate, CompensatedSite, CompensationReport, describe
from .two_networks import Network, TwoNetworks

logger = logging.get_logger(__name__)


class Refit:
    """Refits the maps after the activations, site after site. `networks.undo` takes all of it back."""

    def __init__(self, networks: TwoNetworks) -> None:
        self.networks = networks

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
        with eager_experts(networks.model):
            with networks.smooth():
                traced = trace(networks.model, networks.forward(0))
            report = CompensationReport(uncompensated=dict(traced.obstacles))
            if biases:
                report.bias_attribute = networks.biases.add(m for maps in traced.maps.values() for m in maps)
            with torch.no_grad():
                chains = self._chains(traced)
                total = sum(len(sites) for chain in chains for sites in chain.sites)
                for site in progress(self._refit_all(chains, traced, method), "Refitting", total):
                    report.sites.append(site)
        networks.hard = set(networks.sites)
        order = {name: index for index, name in enumerate(networks.sites)}
        report.sites.sort(key=lambda site: order[site.name])
        report.seconds = time.perf_counter() - start
        few = [site.name for site in report.sites if FEW_ROWS in site.note]
        if few:
            logger.warning(
                f"{len(few)} of {len(report.sites)} sites were refit from few rows for their effective rank, {few[0]} the "
                "first of them: more calibration data would do better"
            )
        return report

    def _chains(self, traced: Trace) -> list[Chain]:
        """The chains that the sites are refit along; block by block where more than the hidden state is carried along."""
        chains: list[Chain] = []
        with self.networks.smooth():
            forward = self.networks.forward(0)
            found = find_chains(self.networks.model, forward, {s: traced.maps[s] for s in traced.order if s in traced.maps})
        for chain in found:
            chains += [chain] if is_independent(self.networks, chain) else chain.split()
        return chains

    def _refit_all(self, chains: list[Chain], traced: Trace, method: Compensate) -> Iterator[CompensatedSite]:
        for chain in chains:
            self.networks.hard |= _uncompensated_before(traced, chain)
            walk = ChainWalk(self.networks, chain)
            for step, sites in enumerate(chain.sites):
                for site in sites:
                    yield self._refit(walk, site, traced.maps[site], method)
                    self.networks.hard.add(site)
                if step + 1 < len(chain.sites):
                    walk.advance()

    def _refit(self, walk: ChainWalk, site: str, maps: list[LinearMap], method: Compensate) -> CompensatedSite:
        """Refit the maps after one site."""
        evidence = self._evidence(walk, site, maps)
        evidence.check_finite()
        verdicts = []
        for linear in maps:
            fit, held_out = evidence.sums[linear.label]
            correction, verdict = decide(fit, held_out, method, biased=linear.bias is not None, scale=evidence.scale)
            self.networks.correct(linear, correction)
            verdicts.append(verdict)
        target = "local" if evidence.meeting is None else "stream"
        biased = all(linear.bias is not None for linear in maps)
        return describe(site, maps[0].name, target, verdicts, evidence.norm, biased)

    def _evidence(self, walk: ChainWalk, site: str, maps: list[LinearMap]) -> Evidence:
        """Run the block as both networks over the calibration set, and gather what a refit of the maps needs."""
        networks, pooled = self.networks, walk.chain.pooled
        single = not pooled and len(maps) == 1 and maps[0].index is None
        evidence = Evidence(site, maps, walk.find_meeting(maps[0]) if single else None)
        meeting = evidence.meeting
        decoder = walk.block in decoder_modules(networks.model)
        first = 0
        for index in range(networks.count):
            batch = networks.batch(index)
            examples = Examples(first, batch_size(networks.model, batch), token_mask(batch, decoder), networks.examples <= 1)
            smooth_calls = walk.calls(Network.SMOOTH, index)
            hard_calls = smooth_calls if pooled else walk.calls(Network.SUBSTITUTED, index)
            for smooth_call, hard_call in zip(smooth_calls, hard_calls, strict=True):
                with networks.substituted(site):
                    given = walk.observe(hard_call, maps, meeting)
                if meeting is None:  # the same state, with this gate smooth
                    with networks.substituted():
                        wanted = walk.observe(hard_call, maps)
                else:
                    with networks.smooth():
                        wanted = walk.observe(smooth_call, maps, meeting)
                    walk.keep_next(Network.SMOOTH, index, wanted.hidden)
                evidence.add(given, wanted, examples)
            first += examples.size
        return evidence


@contextmanager
def compensation(model: nn.Module, loader: Iterable[Any]) -> Iterator[Refit]:
    """A `Refit` that has the calibration set; the model is as it was if the block raises."""
    with scratch_folder() as folder:
        networks = TwoNetworks(model, folder)
        try:
            networks.keep(progress(model_batches(model, loader), "Reading the calibration set", length(loader)))
            yield Refit(networks)
            networks.leave()
            networks.commit()
        except BaseException:
            networks.undo()
            raise


def _uncompensated_before(traced: Trace, chain: Chain) -> set[str]:
    """Sites that come before the chain and are not refit: ReLU too by the time that the chain's turn comes."""
    first = min(traced.order.index(site) for sites in chain.sites for site in sites)
    return {name for name in traced.order[:first] if name in traced.obstacles}
