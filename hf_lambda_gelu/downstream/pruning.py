"""`prune_dead_units`: units that are 0 on all calibration data are taken out of the weights, and out of the config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..measurement.batches import CalibrationError, model_batches
from ..measurement.difference import difference, float_outputs, tolerance
from ..measurement.forward import measuring, run_batch, same_random_numbers
from ..reports import progress, table, to_dict
from ..structure.edits import own_config, reshape
from ..structure.feed_forward import Blocks, FeedForward
from ..structure.feed_forward_search import feed_forwards
from ..structure.linear_calls import Key, LinearCall
from ..structure.linear_maps import watch_linears
from ..structure.modules import joined, transformers_parts
from ..structure.quantised import quantised_weight
from ..structure.transaction import transaction
from ..structure.usable import check_base_alone, check_usable
from ..structure.widths import misfit, set_width, widths
from .relu_sites import relu_sites

_CHECKED = 4  # batches whose outputs are kept to be compared: those of a language model are large
_NO_NUMBER = "no number in the config is its width alone, so that stock transformers could not load it with another"


@dataclass(frozen=True)
class PrunedSite:
    """One block: its ReLU, its units before, how many of them are 0 on all batches, and its units now."""

    name: str
    units: int
    dead: int
    kept: int


@dataclass
class PruningReport:
    """What `prune_dead_units` did. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        sites: the blocks that could be told, in network order.
        widths: config path → (width before, width now).
        whole: site → why its block was left as it is.
        parameters: of the model, before and now.
        difference: max |after − before| over the outputs on the first four batches, relative to the largest of them.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> report = hlg.prune_dead_units(model, [torch.zeros(1, 4)])
        >>> report.sites[0].kept == model[2].in_features
        True
    """

    sites: list[PrunedSite] = field(default_factory=list)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    difference: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The attributes."""
        return to_dict(self)

    def __str__(self) -> str:
        before, now = self.parameters
        removed = sum(site.units - site.kept for site in self.sites)
        lines = [
            f"{removed} units removed, {before - now:,} of {before:,} parameters; outputs changed by {self.difference:.1e} "
            "(relative)"
        ]
        rows = [[s.name, str(s.units), str(s.dead), str(s.kept)] for s in self.sites]
        lines += table(["site", "units", "never fire", "kept"], [">7", ">10", ">7"], rows)
        lines += [f"  config.{path}: {old} → {new}" for path, (old, new) in self.widths.items()]
        if any(s.units - s.kept < s.dead and s.name not in self.whole and s.kept > 1 for s in self.sites):
            lines.append("  a width of several layers is that of the one which needs most")
        lines += [f"  {name} is left whole: {reason}" for name, reason in self.whole.items()]
        return "\n".join(lines)


@transaction
@torch.no_grad()
def prune_dead_units(model: nn.Module, batches: Iterable[Any]) -> PruningReport:
    """Remove, in place, the units of feed-forward blocks that are 0 on all of `batches`. [derived]

    With y = W₂ (max(0, W₁x + b₁) ⊙ (W₃x + b₃)) + b₂, where only gated blocks have the factor with W₃, a unit j that is 0 at
    every position adds nothing: row j of W₁, b₁, W₃ and b₃ is removed, and column j of W₂. On the batches nothing changes
    but rounding. On other data a unit that is gone might have fired: take many batches, like those that it will meet.
    Padding counts here, unlike in `activation_sparsity`: so the outputs at padding stay too.

    Stock transformers can load what is saved. It has one width for all layers (or for all of an encoder, of a tower), so
    each keeps as many units as the layer that needs most, dead ones among them where it needs fewer; a block keeps one unit
    at least. A block whose width is no number of the config (DINOv2's `mlp_ratio`), or that is not understood (experts), is
    left whole, and the report says why. Parameters stay the same objects with smaller data and without gradients: make the
    optimizer afterwards.

    Args:
        model: a ReLU network, transformers' or any other. In any dtype, on any device.
        batches: as for `activation_sparsity`.

    Returns:
        Per block its units before and now; the widths in the config; what was left whole, and why.

    Raises:
        ValueError: the model is smooth, has no ReLU that is a module, is offloaded, quantised, has adapters or was made in
            torch.inference_mode; or something else uses the units, so that the outputs would change.
        CalibrationError: a loader that yields nothing usable, or a forward that raises.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, 9, -9, -9, -9, 9, 9, 9]))
        >>> _ = hlg.prune_dead_units(model, [torch.rand(10, 4)])
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=5, bias=True)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=4, bias=True)
        )
    """
    check_usable(model)
    sites = relu_sites(model)
    if (quantised := quantised_weight(model)) is not None:
        raise ValueError(f"{quantised} is quantised, so that no units can be taken out of it: prune first, then quantise")
    check_base_alone(model, "pruning")
    stream = model_batches(model, progress(batches, "looking for dead units"))
    with measuring(model):
        first = next(stream)
        with same_random_numbers(model):
            blocks = feed_forwards(model, sites, lambda: run_batch(model, first, 0))
        fires, compared = _run(model, blocks, chain([first], stream))
        report = PruningReport(whole=dict(blocks.obstacles))
        before = sum(p.numel() for p in model.parameters())
        kept = _set_widths(model, blocks, fires, report)
        for name, width in kept.items():
            _cut(model, blocks.found[name], _chosen(fires[name], width))
        report.parameters = before, sum(p.numel() for p in model.parameters())
        _check_outputs(model, compared, report)
    _check_rebuilt(model, [blocks.found[name] for name in kept])
    return report


_Compared = list[tuple[dict[str, Any], list[Tensor]]]  # batches and what the model made of them


def _run(model: nn.Module, blocks: Blocks, batches: Iterable[dict[str, Any]]) -> tuple[dict[str, Tensor], _Compared]:
    """Site → which units are not 0 somewhere (units,), bool; and the first batches with the outputs."""
    by_key: dict[Key, str] = {block.after.key: name for name, block in blocks.found.items()}
    fires = {name: torch.zeros(block.units, dtype=torch.bool, device="cpu") for name, block in blocks.found.items()}

    def on_linear(call: LinearCall) -> None:
        name = by_key.get(call.key)
        if name is not None:  # a NaN is not 0
            fires[name] |= (call.input != 0).reshape(-1, call.input.shape[-1]).any(0).cpu()

    compared: _Compared = []
    for index, batch in enumerate(batches):
        with same_random_numbers(model), watch_linears(on_linear):
            outputs = float_outputs(run_batch(model, batch, index))
        if index < _CHECKED:
            compared.append((batch, [output.clone() for output in outputs]))
    return fires, compared


def _set_widths(model: nn.Module, blocks: Blocks, fires: Mapping[str, Tensor], report: PruningReport) -> dict[str, int]:
    """Site → units to keep, of the blocks that shrink; sets the configs' widths, and completes the report."""
    kept = {name: max(1, int(alive.sum())) for name, alive in fires.items()}
    for prefix, part in transformers_parts(model).items():
        inside = {name: block for name, block in blocks.found.items() if not prefix or name.startswith(f"{prefix}.")}
        own_config(part, model)
        decided = {}
        for width in widths(part, inside):
            wanted = max(kept[name] for name in width.sites)
            if width.obstacle:
                report.whole.update(dict.fromkeys(width.sites, width.obstacle))
            elif wanted < width.value:
                set_width(part, width, wanted)
                report.widths[joined(prefix, width.path)] = int(width.value), wanted
            decided.update(dict.fromkeys(width.sites, int(width.value) if width.obstacle else wanted))
        for name, block in inside.items():
            if name not in decided and kept[name] < block.units:
                report.whole[name] = _NO_NUMBER
            kept[name] = decided.get(name, block.units)
    for name, block in blocks.found.items():
        dead = block.units - int(fires[name].sum())
        report.sites.append(PrunedSite(name, block.units, dead, kept[name]))
    return {name: width for name, width in kept.items() if width < blocks.found[name].units}


def _chosen(fires: Tensor, width: int) -> Tensor:
    """The indices of `width` units in their order: all that fire, and the first of those that do not."""
    order = torch.argsort(fires.int(), descending=True, stable=True)
    return order[:width].sort().values


def _cut(model: nn.Module, block: FeedForward, units: Tensor) -> None:
    """Keep these units alone, in the parameters and in what their modules say of their widths."""
    smaller = {side.parameter: block.of_units(side, units) for side in block.parameters}
    for parameter, data in smaller.items():
        reshape(parameter, data)
    for name, attributes, times in block.attributes:
        module = model.get_submodule(name)
        for attribute in attributes:
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, times * len(units))


def _check_outputs(model: nn.Module, compared: _Compared, report: PruningReport) -> None:
    """ValueError if the outputs are not what they were."""
    for index, (batch, before) in enumerate(compared):
        try:
            with same_random_numbers(model):
                after = float_outputs(run_batch(model, batch, index))
        except CalibrationError as error:
            raise ValueError(f"{type(model).__name__} does not run without the units that never fire: {error}") from error
        found = difference(before, after)
        if not found <= tolerance(before):
            raise ValueError(
                f"without the units that never fire the outputs on batch {index} would change by {found:.2g} (relative): "
                "something else uses these units, or the outputs are not finite. The model is as it was"
            )
        report.difference = max(report.difference, found)


def _check_rebuilt(model: nn.Module, blocks: list[FeedForward]) -> None:
    """ValueError if stock transformers would build other shapes from the configs."""
    cut = {side.parameter for block in blocks for side in block.parameters}
    reason = misfit(model, cut)
    if reason is not None:
        raise ValueError(reason)
