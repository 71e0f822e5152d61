"""Puts several ReLUs in the place of each gate, in the substituted network: measure, place, widen; configs at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...activation.bases import BASES
from ...measurement.batches import CalibrationError
from ...measurement.places import chunks, places
from ...structure.edits import own_config
from ...structure.linear_maps import LinearMap
from ...structure.modules import joined
from ...structure.tracing import Trace
from ...structure.widths import misfit, set_width
from ..refit.chain_walk import ChainWalk
from ..refit.held_out import Examples, split
from ..refit.meeting_point import flat, observe
from ..refit.ridge import wide_device
from ..refit.row_weights import RowWeights
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

    def plan(self, forward: Callable[[], Any]) -> list[LinearMap]:
        """Find what will be wider, on a run that reaches all sites; the maps around it, which want biases.

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
        gates = [site.block.gate for site in self._plan.sites.values() if site.block.gate.bias is None]
        return [m for site in self._plan.sites.values() for m in site.maps] if gates else []

    def check(self, traced: Trace, method: str) -> None:
        """Once maps have their biases: whether each layer can be wider, and there are rows enough to refit it."""
        check_biases(self._plan)
        networks = self.networks
        for name, site in self._plan.sites.items():
            found = traced.maps.get(name, [])
            if [linear.parameter for linear in found] != [site.block.after.parameter]:
                reason = traced.obstacles.get(name, "another map takes up its output")
                raise HingeError(f"{name}: the map after it cannot be refit ({reason}). Use hinges=1")
            examples = networks.examples if self.examples is None else self.examples
            rows = math.prod(traced.leading[name]) * examples / max(1, networks.sizes[0])
            if method == "least_squares" and rows < site.units:
                raise CalibrationError(
                    f"{name} will have {site.units} units, and the calibration set has about {rows:.0f} rows (tokens, "
                    f"patches) for it: a refit of so wide a layer wants {site.units} at least, several times as many to be "
                    "good. Pass more examples, or a smaller width"
                )

    # ----------------------------------------------------------------------------------------------------- site by site

    def widen(self, walk: ChainWalk, name: str, positions_first: bool) -> None:
        """Measure what the site gets, place its hinges there, and make its layer wider; nothing where that is done."""
        site = self._plan.sites.get(name)
        if site is None or name in self.networks.wide:
            return
        histogram = self._measured(walk, name, site, positions_first)
        gate, block = self.networks.sites[name], site.block
        shifted = block.up is None and block.after.bias is not None
        found = place(histogram, BASES[gate.base].activation, self.wanted.most, shifted=shifted, activity=_ACTIVITY)
        gain = histogram.weight.sum(1) * column_norms(block.after).to(histogram.device)
        gain = gain / torch.as_tensor(histogram.hardness, device=gain.device).double().square()
        self._put(name, site, spent(found, gain, site.units))

    def widen_all(self) -> None:
        """Make all layers wider by minimax hinges, without data."""
        check_biases(self._plan)
        for name, site in self._plan.sites.items():
            gate = self.networks.sites[name]
            best = minimax(gate.base, self.wanted.hinges)
            hardness = gate.hardness.detach().reshape(-1)
            hinges = alike(hardness, site.block.units, torch.tensor(best.at), torch.tensor(best.weights))
            self._put(name, site, hinges, best.bound / float(hardness.min()))

    def _put(self, name: str, site: PlannedSite, hinges: Hinges, bound: float | None = None) -> None:
        units = site.block.units
        self.networks.widen(name, widened(site.block, hinges), site.numbers)
        self.report.sites.append(HingedSite(name, (units, len(hinges.neuron)), hinges.counts(units), bound))

    def _measured(self, walk: ChainWalk, name: str, site: PlannedSite, positions_first: bool) -> Histogram:
        """What the gate gets in the substituted network; in a gated layer weighed by u², what the gate is multiplied by."""
        networks, block = self.networks, site.block
        hardness = networks.sites[name].hardness.detach().float()
        histogram = Histogram(block.units, hardness, wide_device(hardness.device))
        weigh, first = RowWeights(), 0
        for index in range(networks.count):
            examples = Examples(first, networks.examples <= 1)
            first += networks.sizes[index]
            for run in walk.runs(Network.SMOOTH if walk.pooled else Network.SUBSTITUTED, index):
                with networks.substituted(name):
                    seen = observe(replace(run, sample=None), block.before)
                gate = seen.calls.get(block.gate.label, [])
                ups = [None] * len(gate) if block.up is None else seen.calls.get(block.up.label, [])
                stream = None if seen.hidden is None else flat(seen.hidden)
                for call, up, chunk in zip(gate, ups, chunks([c.note for c in gate]), strict=True):
                    fit, held_out = split(places(call.note, chunk, positions_first), examples)
                    rows = (fit | held_out).to(call.input.device)
                    weight = None if up is None else up.output[rows].float().square()
                    if stream is not None and len(stream) == len(call.output):
                        each = weigh.of(stream)[rows].unsqueeze(1)
                        weight = each if weight is None else weight * each
                    histogram.add(call.output[rows], weight)
        return histogram

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
        around = {parameter for site in self._plan.sites.values() for parameter, _ in site.block.parameters}
        reason = misfit(model, around)
        if reason is not None:
            raise HingeError(reason)
        return self.report
