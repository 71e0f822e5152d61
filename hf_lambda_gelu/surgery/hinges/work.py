"""Puts several ReLUs in the place of each gate, in the substituted network: measure, place, widen; configs at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...activation.bases import BASES
from ...measurement.batches import CalibrationError
from ...measurement.places import chunks, places
from ...structure.edits import own_config
from ...structure.feed_forward import FeedForward
from ...structure.linear_maps import LinearMap
from ...structure.modules import joined
from ...structure.tracing import Trace
from ...structure.widths import misfit, set_width
from ..refit.chain_walk import ChainWalk
from ..refit.held_out import split
from ..refit.meeting_point import flat, observe
from ..refit.ridge import wide_device
from ..refit.row_weights import RowWeights
from ..refit.runs import ReplayError
from ..refit.two_networks import Network, TwoNetworks
from .minimax import minimax
from .placement import Histogram, place
from .plan import HingeError, Plan, PlannedSite, check_biases, plan_hinges
from .report import HingedSite, HingeReport
from .wanted import Wanted
from .widening import Hinges, alike, column_norms, spent, widened

# what a hinge's being active costs in the choice of places, see `place`
_ACTIVITY = 0.02


class HingeWork:
    """Makes layers wider in the substituted network, site after site; `networks.undo` takes it back.

    Args:
        examples: how many the refit will have, if not what `networks` keeps; infinity where they were counted before.

    Attributes:
        report: what was done.
    """

    def __init__(self, networks: TwoNetworks, wanted: Wanted, examples: float | None = None) -> None:
        self.networks, self.wanted, self.examples = networks, wanted, examples
        self.report = HingeReport()
        self._plan = Plan()

    # ------------------------------------------------------------------------------------------------------ beforehand

    def plan(self, forward: Callable[[], Any]) -> tuple[list[LinearMap], list[LinearMap]]:
        """Find what will be wider, on a run that reaches all sites; the maps around it, and the gates that lack biases.

        Raises:
            HingeError: nothing can be, or something cannot.
        """
        networks = self.networks
        with networks.substituted(*networks.sites):
            self._plan = plan_hinges(networks.model, networks.sites, forward, self.wanted)
        self.report.single = {name: self._plan.single[name] for name in networks.sites if name in self._plan.single}
        for name, site in self._plan.sites.items():
            count = networks.sites[name].hardness.numel()
            if count not in (1, site.block.units):
                raise HingeError(f"{name} has {count} numbers λ for {site.block.units} units: expected one, or one each")
        return self._plan.wanting

    def check(self, traced: Trace, method: str) -> None:
        """Once maps have their biases: whether each layer can be wider, and there are rows enough to refit it."""
        networks = self.networks
        check_biases(networks.model, self._plan)
        for name, site in self._plan.sites.items():
            found = traced.maps.get(name, [])
            if [linear.parameter for linear in found] != [site.block.after.parameter]:
                reason = traced.obstacles.get(name, "another map takes up its output")
                raise HingeError(f"{name}: the map after it cannot be refit ({reason}). Use hinges=1")
            examples = networks.batches.deal.examples if self.examples is None else self.examples
            rows = traced.rows[name] * examples / max(1, networks.batches.deal.size(0))
            if method == "least_squares" and rows < site.units:
                enough = math.ceil(site.units * examples / max(1, rows))
                raise CalibrationError(
                    f"{name} will have {site.units} units, and the calibration set has about {rows:.0f} rows (tokens, "
                    f"patches) for it: a refit of so wide a layer wants {site.units} at least, as {enough} examples in "
                    f"place of {examples} would have, and several times as many to be good. Pass more, or a smaller width"
                )

    def shapes(self) -> dict[nn.Parameter, tuple[int, ...]]:
        """The shapes that the parameters around the sites will have."""
        found: dict[nn.Parameter, tuple[int, ...]] = {}
        for site in self._plan.sites.values():
            found |= {side.parameter: side.shape(site.units) for side in site.block.parameters}
        return found

    def around(self, site: str) -> Sequence[LinearMap]:
        """The maps of the layer around a site that will be wider."""
        planned = self._plan.sites.get(site)
        return () if planned is None else planned.maps

    # ----------------------------------------------------------------------------------------------------- site by site

    def widen(self, walk: ChainWalk, name: str, positions_first: bool) -> None:
        """Measure what the site gets, place its hinges there, and make its layer wider; nothing where that is done."""
        site = self._plan.sites.get(name)
        if site is None or name in self.networks.wide:
            return
        histogram = self._measured(walk, name, site, positions_first)
        hinges = self.networks.team.led(lambda: self._placed(name, site, histogram), f"the hinges of {name}")
        self._put(name, site, hinges)

    def _placed(self, name: str, site: PlannedSite, histogram: Histogram) -> Hinges:
        gate, block = self.networks.sites[name], site.block
        shifted = block.up is None and block.after.bias is not None
        found = place(histogram, BASES[gate.base].activation, self.wanted.most, shifted=shifted, activity=_ACTIVITY)
        gain = histogram.weight.sum(1) * column_norms(block).to(histogram.device)
        gain = gain / torch.as_tensor(histogram.hardness, device=gain.device).double().square()
        return spent(found, gain, site.units)

    def widen_all(self) -> None:
        """Make all layers wider by minimax hinges, without data."""
        check_biases(self.networks.model, self._plan)
        self.networks.expect(self.shapes())
        for name, site in self._plan.sites.items():
            gate = self.networks.sites[name]
            best = minimax(gate.base, self.wanted.hinges)
            hardness = gate.hardness.detach().reshape(-1)
            at, weights = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in (best.at, best.weights))
            hinges = alike(hardness, site.block.units, at, weights)
            around = [p for linear in site.maps for p in (linear.parameter, linear.bias) if p is not None]
            with self.networks.holding(around):
                self._put(name, site, hinges, best.bound / float(hardness.min()))

    def _put(self, name: str, site: PlannedSite, hinges: Hinges, bound: float | None = None) -> None:
        units = site.block.units
        self.networks.widen(name, widened(site.block, hinges), site.numbers)
        self.report.sites.append(HingedSite(name, (units, len(hinges.neuron)), hinges.counts(units), bound))

    def _measured(self, walk: ChainWalk, name: str, site: PlannedSite, positions_first: bool) -> Histogram:
        """What the gate gets in the substituted network; in a gated layer weighed by u², what the gate is multiplied by."""
        team, batches = self.networks.team, self.networks.batches
        hardness = self.networks.sites[name].hardness.detach().float()
        histogram, weigh = Histogram(site.block.units, hardness, wide_device(hardness.device)), RowWeights()
        add = partial(self._add, walk, name, site.block, positions_first, histogram, weigh)
        with team.together(ReplayError):
            add(batches.head)
        weigh.reference = team.given(batches.deal.leader, weigh.reference, f"weights of {name}")
        with team.together(ReplayError):
            add(batches.rest)
        team.add_up([histogram.weight], f"the histogram of {name}")
        return histogram

    def _add(
        self,
        walk: ChainWalk,
        name: str,
        block: FeedForward,
        positions_first: bool,
        histogram: Histogram,
        weigh: RowWeights,
        own: Iterable[int],
    ) -> None:
        """Let the histogram have what the gate gets on some of the own batches."""
        networks = self.networks
        for index in own:
            for run in walk.runs(Network.SMOOTH if walk.pooled else Network.SUBSTITUTED, index):
                with networks.substituted(name):
                    seen = observe(replace(run, sample=None), block.before)
                calls = [seen.calls.get(linear.label, []) for linear in block.before]
                # a convolution's stream has its channels elsewhere
                stream = None if seen.hidden is None or block.gate.parameter.dim() > 2 else flat(seen.hidden)
                for call, *others, chunk in zip(*calls, chunks([c.note for c in calls[0]]), strict=True):
                    z, u = block.made([call.output, *(other.output for other in others)])
                    fit, held_out = split(places(call.note, chunk, positions_first), networks.batches.examples(index))
                    rows = (fit | held_out).to(call.input.device)
                    weight = None if u is None else u[rows].float().square()
                    if stream is not None and len(stream) == len(z):
                        each = weigh.of(stream)[rows].unsqueeze(1)
                        weight = each if weight is None else weight * each
                    histogram.add(z[rows], weight)

    def note(self, sites: Sequence[str]) -> dict[str, Any]:
        """The reports of these sites, as far as they are wider."""
        return {site.name: asdict(site) for site in self.report.sites if site.name in sites}

    def resume(self, noted: Mapping[str, Any]) -> None:
        """Take over what another process noted, whose wider data the parameters have."""
        for name, entry in noted.items():
            site = self._plan.sites[name]
            changed = [side.parameter for side in site.block.parameters]
            changed += [site.block.after.bias] if site.block.after.bias is not None else []
            self.networks.widen(name, {parameter: parameter.data for parameter in changed}, site.numbers)
            neurons = {int(number): count for number, count in entry["neurons"].items()}  # JSON has made texts of numbers
            self.report.sites.append(HingedSite(name, tuple(entry["units"]), neurons, entry["bound"]))

    # ------------------------------------------------------------------------------------------------------- at the end

    def finish(self) -> HingeReport:
        """Let the configs say the widths that the layers have.

        Raises:
            HingeError: stock transformers would build other shapes from them.
        """
        model = self.networks.model
        self.report.sites.sort(key=lambda site: list(self.networks.sites).index(site.name))
        for prefix, part, width, number in self._plan.widths:
            own_config(part, model)
            set_width(part, width, number)
            self.report.widths[joined(prefix, width.path)] = width.value, number
        around = {side.parameter for site in self._plan.sites.values() for side in site.block.parameters}
        reason = misfit(model, around)
        if reason is not None:
            raise HingeError(reason)
        return self.report
