"""Layers that are to be wider in the midst of a training run: what they need from its start, and both of their shapes.

A run that is resumed, or that takes back its best checkpoint, loads weights of either shape into a model of the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...measurement.forward import measuring
from ...structure.config import get_attribute
from ...structure.config_probe import bias_attributes
from ...structure.edits import own_config, reshape
from ...structure.modules import joined, transformers_parts
from ...structure.quantised import quantised_weight
from ...structure.scratch import scratch_folder
from ...structure.transaction import transaction
from ...structure.widths import Width, set_width
from ..refit.biases import AddedBiases
from ..refit.two_networks import TwoNetworks
from .plan import HingeError, Plan, check_biases, plan_hinges
from .report import HingeReport
from .wanted import Wanted
from .without_data import made_up_run


class Layers:
    """The layers of a model that hinges will make wider, as wide as they are and as wide as they will be.

    Attributes:
        bias: the config attribute that has given their maps biases; None where they had them.
    """

    def __init__(self, model: nn.Module, plan: Plan, bias: str | None) -> None:
        self.model, self.bias = model, bias
        self._plan = plan
        self._units = {name: (site.block.units, site.units) for name, site in plan.sites.items()}

    def fit(self, stored: HingeReport | None) -> None:
        """Let the layers have the shapes of a checkpoint, and configs say so; the values are then of no use.

        Args:
            stored: what hinges had done by then; None for nothing.

        Raises:
            ValueError: layers as wide as those of the checkpoint are not among what was planned. Nothing was changed.
        """
        wanted = {} if stored is None else {site.name: site.units for site in stored.sites}
        for name, (before, now) in wanted.items():
            planned = self._units.get(name)
            if planned is None or (planned != (before, now) and planned[0] != now):
                raise ValueError(
                    f"the checkpoint was saved after its switch, and has {name} with {now} units in the place of {before}; "
                    f"by its arguments this run makes {planned[0] if planned else 'none'} into "
                    f"{planned[1] if planned else 'none'}. Set hardness_hinges and hardness_budget as in the run that wrote "
                    "it, and start from the same model"
                )
        for name, units in self._units.items():
            self._put(name, wanted[name][1] if name in wanted else units[0])
        for _, part, width, number in self._plan.widths:
            wide = any(name in wanted and wanted[name] == self._units[name] for name in width.sites)
            self._set_config(part, width, number if wide else width.value)

    @torch.no_grad()
    def _put(self, name: str, units: int) -> None:
        site = self._plan.sites[name]
        now = site.block.units
        if units == now:
            return
        for side in site.block.parameters:
            reshape(side.parameter, side.parameter.new_zeros(side.shape(units)))
        for module, attribute, narrow, wide in site.numbers:
            setattr(module, attribute, wide if units == self._units[name][1] else narrow)

    def _set_config(self, part: PreTrainedModel, width: Width, number: int | float) -> None:
        held: Any = get_attribute(part.config, width.path)
        if held != number and not (held is None and number == width.value):
            own_config(part, self.model)
            set_width(part, replace(width, value=width.value if held is None else held), number)


@transaction
def prepare_layers(model: nn.Module, wanted: Wanted, give_biases: bool = True) -> Layers:
    """Find, on a batch that is made up, which layers will be wider, and give their maps the biases, zeros, that they lack.

    Args:
        give_biases: False to raise where a bias is lacking: an optimizer that is there already does not have it.

    Raises:
        HingeError: none can be, or something cannot. The model is as it was.
    """
    quantised = quantised_weight(model)
    if quantised is not None:
        raise HingeError(f"{quantised} is quantised and cannot be made wider")
    try:
        run = made_up_run(model)
    except HingeError as error:
        raise HingeError(
            f"which layers those are is seen in a run, and no inputs for one can be made up ({error.__cause__ or error})"
        ) from error
    with scratch_folder() as folder, measuring(model):
        networks = TwoNetworks(model, folder)
        with networks.substituted(*networks.sites):
            plan = plan_hinges(model, networks.sites, run, wanted)
    path = None
    if any(site.block.gate.bias is None for site in plan.sites.values()):
        if give_biases:
            path = AddedBiases(model).add(*plan.wanting)
        else:
            _check_there(model, plan)
    check_biases(model, plan)
    return Layers(model, plan, path)


def _check_there(model: nn.Module, plan: Plan) -> None:
    """HingeError, with the switch of the config, where gates lack biases that it can give."""
    for prefix, part in transformers_parts(model).items():
        start = f"{prefix}." if prefix else ""
        gates = [
            s.block.gate for s in plan.sites.values() if s.block.gate.bias is None and s.block.gate.name.startswith(start)
        ]
        lacking = {gate.name.removeprefix(start).removesuffix("weight") + "bias" for gate in gates}
        found = bias_attributes(part, lacking) if lacking else None
        if found is not None:
            switches = ", ".join(f"{joined(prefix, path)}=True" for path in found[0])
            raise HingeError(
                f"{gates[0].name} has no bias, which several ReLUs per gate need from the start of training: load the model "
                f"with {switches}, whose biases begin as zeros, before the optimizer is made"
            )
