"""Whether a model can be substituted, and as it is asked for; looked at before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import distributed, nn

from ..activation.hardness import sup_error, target_hardness
from ..activation.module import hardness_profile, hardness_sites
from ..measurement.team import Team
from ..structure.forwards import bypassed_by_code, refusal
from ..structure.hard_coded import hard_coded_sites
from ..structure.offloading import check_not_offloaded
from ..structure.quantised import quantised_weight
from ..structure.sharding import check_by_blocks, check_whole, is_cut_by_fsdp2, is_sharded
from ..structure.smooth_activations import smooth_activations
from ..structure.usable import check_base_alone, check_usable
from .gates import SoftGateError
from .refit.report import Compensate
from .report import SubstitutedSite

# a ramp ends at its target to fp32's accuracy, not to the last bit
_SLACK = 1e-3


def check_options(calibration: Iterable[Any] | None, compensate: Compensate | None) -> None:
    """ValueError for a `compensate` that is unknown or lacks a calibration set."""
    if compensate not in (None, *get_args(Compensate)):
        raise ValueError(f"unknown compensate={compensate!r}: expected 'least_squares', 'bias' or None")
    if compensate is not None and calibration is None:
        raise ValueError(
            f"compensate={compensate!r} learns from data: pass calibration=…, batches like those that the model will meet. "
            "A few hundred unlabelled examples do"
        )


def check_refit(model: nn.Module, compensate: Compensate | None) -> None:
    """ValueError if a refit is asked for of weights that no processes can bring together: before it is asked who refits."""
    if compensate is not None and isinstance(model, nn.Module) and not is_cut_by_fsdp2(model):
        check_whole(model, f"compensate={compensate!r}", _LOAD_WHOLE)


def check_cut_up(model: nn.Module, compensate: Compensate | None, team: Team, wider: bool = False) -> None:
    """ValueError if weights are cut up in a way in which this cannot be done.

    Args:
        team: the processes that do it.
        wider: whether layers shall be wider.
    """
    if not isinstance(model, nn.Module) or not is_sharded(model):
        return
    if wider:
        check_whole(model, "hinges=… or budget=…", _LOAD_WHOLE)
    alone = team.size == 1 and distributed.is_initialized() and distributed.get_world_size() > 1
    if compensate is not None or team.size > 1:
        check_by_blocks(model, "processes='all'" if compensate is None else f"compensate={compensate!r}", _LOAD_WHOLE)
    if compensate is not None and alone:
        check_whole(
            model, f"compensate={compensate!r} of one process", "pass processes='all', and to each process its own batches"
        )
    stay = hard_coded_sites(model)
    if compensate is not None and stay:
        check_whole(
            model, f"λ of {stay[0]}, which has to go into the weights as no config attribute governs it,", _LOAD_WHOLE
        )


_LOAD_WHOLE = (
    "while training let λ climb instead, by set_hardness along a HardeningSchedule; afterwards load what was saved into a "
    "model in one process and do it there"
)


def check_substitutable(
    model: nn.Module, calibration: Iterable[Any] | None, compensate: Compensate | None
) -> list[SubstitutedSite]:
    """The sites with their λ; ValueError if this model cannot be substituted, or not as it is asked for."""
    check_usable(model)
    check_options(calibration, compensate)
    if compensate is not None:
        check_base_alone(model, f"compensate={compensate!r}")
    quantised = quantised_weight(model)
    if compensate is not None and quantised is not None:
        raise ValueError(f"{quantised} is quantised and cannot be refit: substitute first, then quantise the ReLU model")
    check_not_offloaded(model)
    if any(site.unclipped_hardness.is_meta for site in hardness_sites(model).values()):
        raise ValueError("the model is on the meta device, where λ has no value: load its weights first")
    profile = hardness_profile(model)
    if not profile:
        smooth = smooth_activations(model)
        hint = "call convert(model) first" if smooth else "it is a ReLU model already, or never was converted"
        raise ValueError(f"{type(model).__name__} has no λ-GELU to replace: {hint}")
    diverged = [name for name, value in profile.items() if not math.isfinite(value)]
    if diverged:
        raise ValueError(
            f"λ of {len(diverged)} of {len(profile)} sites is no number ({diverged[0]}: {profile[diverged[0]]}): training "
            "has diverged, and with it the weights. Load an earlier checkpoint"
        )
    reasons = bypassed_by_code(model, profile)
    if reasons:
        raise ValueError(refusal(reasons))
    bases = {name: site.base for name, site in hardness_sites(model).items()}
    return [SubstitutedSite(name, bases[name], value, sup_error(value, bases[name])) for name, value in profile.items()]


def soft_sites(
    sites: list[SubstitutedSite], tolerance: float, targets: Mapping[str, float] | None, refused: bool
) -> list[SubstitutedSite]:
    """The sites whose λ is below its target, or below that of `tolerance`; SoftGateError if such are to be refused."""
    wanted = {s.name: target_hardness(tolerance, s.base) for s in sites} if targets is None else targets
    missing = [s.name for s in sites if s.name not in wanted]
    if missing:
        raise ValueError(f"targets names no λ for {len(missing)} of {len(sites)} sites, {missing[0]} the first of them")
    soft = [s for s in sites if s.hardness < wanted[s.name] * (1.0 - _SLACK)]
    if soft and refused:
        worst = min(soft, key=lambda site: site.hardness / wanted[site.name])
        measure = f"tolerance {tolerance:g}" if targets is None else "their targets"
        raise SoftGateError(
            f"{len(soft)} of {len(sites)} gates are soft for {measure}: {worst.name} has λ = {worst.hardness:.4g}, "
            f"expected at least {wanted[worst.name]:.4g}. Finish the ramp, pass the tolerance or targets of the run, "
            "compensate='least_squares' with a calibration set, or force=True to substitute all the same"
        )
    return soft
