"""`harden`: gates become hard at once, the maps after them are refit, and the network goes on being trained. [derived]"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..activation.copies import stepped_copy
from ..activation.hardness import DEFAULT_TOLERANCE, target_hardness
from ..activation.module import hardness_sites
from ..measurement.forward import measuring
from ..measurement.team import ALONE, Processes, Team, team_of
from ..measurement.whole_blocks import whole_blocks
from ..structure.transaction import keep, transaction
from .hinges.report import HingeReport
from .hinges.wanted import Wanted
from .hinges.work import HingeWork
from .refit.engine import compensation
from .refit.report import Compensate, CompensationReport
from .substitutable import check_cut_up, check_substitutable


@transaction
def harden(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    compensate: Compensate = "least_squares",
    tolerance: float = DEFAULT_TOLERANCE,
    targets: Mapping[str, float] | None = None,
    processes: Processes | None = None,
) -> CompensationReport:
    """Sets every λ to its target and refits the linear maps after the sites, so that the function stays. [derived]

    What `LambdaGELUTrainer` does at its switch, for a training loop of one's own: the modules stay λ-GELU, weights change in
    their own memory, and no parameter appears that an optimizer lacks. Maps without a bias get none. λ is still a parameter:
    take it out of training by `site.requires_grad_(False)`, or set it again after each step.

    Args:
        model: after `convert`, in whatever mode it is.
        calibration: batches of inputs as for `relu_ize`, a few hundred examples.
        compensate: "least_squares" or "bias", as for `relu_ize`.
        tolerance: ε, which gives λ's target, 159.58 by default; see `target_hardness`.
        targets: {module name: λ} instead, of `calibrate` for one. A λ that is larger stays.
        processes: as for `relu_ize`. Without it each process refits by itself, and all must pass the same batches; weights
            that `fully_shard` has cut up want "all".

    Returns:
        What was refit.

    Raises:
        ValueError: as for `relu_ize`; `targets` lacks a site; weights are sharded by ZeRO-3 or FSDP1.
        CalibrationError: as for `relu_ize`.

    Where it raises, the model is as it was.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> report = hlg.convert(model)
        >>> report = hlg.harden(model, [torch.randn(64, 4)])
        >>> {name: round(value, 2) for name, value in hlg.hardness_profile(model).items()}
        {'1': 159.58}
    """
    team = team_of(processes, model)
    with team.whole():
        check_cut_up(model, compensate, team)
        with whole_blocks(model, team):
            report, hardness = _refit(model, calibration, compensate, tolerance, targets, team)
        for name, site in hardness_sites(model).items():
            for held in (site.unclipped_hardness, stepped_copy(site.unclipped_hardness)):
                if held is not None:
                    keep(held)
            site.set_hardness(hardness[name])
        return report


def _refit(
    model: nn.Module,
    calibration: Iterable[Any],
    compensate: Compensate,
    tolerance: float,
    targets: Mapping[str, float] | None,
    team: Team,
) -> tuple[CompensationReport, dict[str, float]]:
    """The maps are refit; the report, and {module name: λ} that the sites get."""
    check_substitutable(model, calibration, compensate)
    sites = hardness_sites(model)
    wanted = {name: target_hardness(tolerance, site.base) for name, site in sites.items()} if targets is None else targets
    missing = [name for name in sites if name not in wanted]
    if missing:
        raise ValueError(f"targets names no λ for {len(missing)} of {len(sites)} sites, {missing[0]} the first of them")
    report = refit_for_hard_gates(model, calibration, compensate, team=team).report
    return report, {name: max(wanted[name], site.hardness.item()) for name, site in sites.items()}


@dataclass(frozen=True)
class HardRefit:
    """A refit for gates that become hard.

    Attributes:
        parameters: those that were refit.
        reshaped: those of them that have another shape now.
        hinges: what layers became wider; None for layers as they are.
    """

    report: CompensationReport
    parameters: list[nn.Parameter]
    reshaped: list[nn.Parameter]
    hinges: HingeReport | None


@transaction
def refit_for_hard_gates(
    model: nn.Module, batches: Iterable[Any], method: Compensate, wanted: Wanted | None = None, team: Team = ALONE
) -> HardRefit:
    """Refit the maps for gates that become hard now, in wider layers if `wanted` says so; λ stays.

    Args:
        team: the processes that refit together, within `whole`; the batches are this one's share.
    """
    # the rows were counted before training: few of them are a warning by now
    wider = None if wanted is None else partial(HingeWork, wanted=wanted, examples=math.inf)
    hinges = None
    with compensation(model, batches, wider, team) as work:
        with measuring(model, in_run=True):
            report = work.run(method, biases=False)
        if isinstance(work.wider, HingeWork):
            hinges = work.wider.finish()
    originals = work.originals
    return HardRefit(report, list(originals), [p for p, before in originals.items() if p.shape != before.shape], hinges)


@transaction
def rehearse_refit(
    model: nn.Module, batches: Iterable[Any], wanted: Wanted | None = None, examples: int | None = None
) -> dict[str, str]:
    """{site: reason} of what `refit_for_hard_gates` could not refit; the model stays as it was. [derived]

    Args:
        examples: how many there will be, to be told if they are too few for wider layers.

    Raises:
        CalibrationError: as a refit would, but for what its solving finds.
        HingeError: as a refit in wider layers would.
    """
    wider = None if wanted is None else partial(HingeWork, wanted=wanted, examples=examples)
    with measuring(model, in_run=True), compensation(model, batches, wider) as work:
        return work.rehearse()
