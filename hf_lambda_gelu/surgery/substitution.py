"""`relu_ize`: λ-GELU becomes ReLU, with a report of what that changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import EvalPrediction
from transformers.activations import ACT2FN

from ..activation.hardness import DEFAULT_TOLERANCE, sup_error
from ..activation.module import hardness_sites
from ..measurement.batches import check_dealt, model_batches
from ..measurement.change import MeasuredChange, measure_change
from ..measurement.forward import measuring
from ..measurement.team import Processes, Team, check_same_weights, team_of
from ..measurement.whole_blocks import whole_blocks
from ..reports import length
from ..structure.adapters import has_adapters
from ..structure.config import LAMBDA_KEYS, activation_attributes
from ..structure.edits import replace_everywhere, set_activation
from ..structure.hard_coded import hard_coded_sites
from ..structure.modules import joined, transformers_parts, wrapped_part
from ..structure.smooth_activations import smooth_activations
from ..structure.transaction import keep, transaction
from .adapter_hardness import save_hardness_with_adapters
from .folding import fold
from .gates import SoftGateError, gates_as_relu
from .hinges.wanted import Wanted, check_hinges
from .hinges.without_data import minimax_hinges
from .hinges.work import HingeWork
from .refit.engine import compensation
from .refit.report import Compensate
from .refit.two_networks import TwoNetworks
from .relu_runs import Runs, check_relu_runs, run_as_relu, runs_by_part
from .report import FOLDED_HARDNESS, SubstitutionReport
from .substitutable import check_cut_up, check_refit, check_substitutable, soft_sites


@transaction
def relu_ize(
    model: nn.Module,
    force: bool = False,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    targets: Mapping[str, float] | None = None,
    calibration: Iterable[Any] | None = None,
    compensate: Compensate | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    hinges: int = 1,
    budget: float | None = None,
    processes: Processes | None = None,
) -> SubstitutionReport:
    """Replace, in place, every λ-GELU, x Φ(λx), by ReLU, max(x, 0), and let the config say so: stock transformers loads it.

    Substitution is the paper's (arXiv 2603.21991), the rest is derived. Where it raises, the model is as it was.

    Args:
        model: a converted model, at any λ, on any device, in any dtype. Sites that its class hard-codes stay smooth, at
            λ = 2¹⁴ in the weights (`fold`).
        force: substitute soft gates too, with `hinges` those that have none: a naive swap, which may ruin the network.
        tolerance: ε; gates with λ < `target_hardness(ε)` count as soft. Give the one that the run was trained with.
        targets: {module name: λ} below which a gate counts as soft, in place of `tolerance`: `trainer.hardness_targets` of a
            run with `hardness_target="calibrated"`, or `calibrate(…).targets(…)`.
        calibration: batches like those that the model will meet, of what its forward takes, iterated once. The change of the
            outputs and the zeros of each ReLU are measured on them, and the loss if they hold labels.
        compensate: "least_squares" refits on them, without labels, the linear map after each activation, so that the network
            computes what it did before; "bias" only shifts that map's bias. It is for soft gates: `force` is not needed.
        compute_metrics: as for `Trainer`; measured before and after, on batches with labels.
        hinges: k ReLUs in the place of each gate, f(x) ≈ Σᵢ aᵢ max(x − tᵢ, 0), in layers k times as wide, as the config then
            says. With `compensate` k ≤ 4, tᵢ by the data; without, k = 4 to 6 by minimax, the report bounds |f − Σ|.
        budget: the width over the width before, 1 to 4, in place of `hinges`; spent where it saves most. Needs `compensate`.
        processes: "all" joins the processes of torch.distributed: each calls with the same model and its own share of the
            batches, and all end with the same bits. "one" works alone. Weights that `fully_shard` has cut up want "all".

    Returns:
        Per site λ and the bound on what changes; what was refit; the measured changes; smooth activations that remain.

    Raises:
        ValueError: called in torch.inference_mode, no λ-GELU in the model, offloaded weights, weights cut up by other
            engines, a fused kernel in the place of sites or ReLUs; a `compensate` that is unknown, without a calibration
            set, without `processes` where several run, or for adapters in the layers. What one process raises, all do.
        RuntimeError: processes that work together and have not the same model, or of which one has ended.
        CalibrationError: a calibration set that cannot be used, or on which the model's forward raises.
        SoftGateError: soft gates, and neither `force` nor `compensate`, nor `hinges` in their layers.
        FoldError: a hard-coded site whose weights cannot take λ up.
        HingeError: a layer that cannot be wider: the gate's map can have no bias, or its width is not in the config.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> _ = hlg.convert(model, init_hardness=200.0)
        >>> _ = hlg.relu_ize(model)
    """
    check_refit(model, compensate)
    team = team_of(processes, model, "" if compensate is None else "refit the model")
    with team.whole():
        asked = _Asked(calibration, compensate, compute_metrics, check_hinges(hinges, budget, compensate is not None), team)
        with _by_blocks(model, asked):
            return _relu_ized(model, force, tolerance, targets, asked)


@dataclass(frozen=True)
class _Asked:
    """What is asked for, on which batches, and of whom."""

    calibration: Iterable[Any] | None
    compensate: Compensate | None
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    wanted: Wanted | None
    team: Team


def _by_blocks(model: nn.Module, asked: _Asked) -> contextlib.AbstractContextManager[None]:
    """Within the block, weights that are cut up are brought together as the work wants them; ValueError if it cannot be."""
    check_cut_up(model, asked.compensate, asked.team, wider=asked.wanted is not None)
    shared = asked.calibration is not None and asked.team.size > 1  # each process runs the model on batches of its own
    return whole_blocks(model, asked.team) if asked.compensate is not None or shared else contextlib.nullcontext()


def _relu_ized(
    model: nn.Module, force: bool, tolerance: float, targets: Mapping[str, float] | None, asked: _Asked
) -> SubstitutionReport:
    calibration, compensate, wanted, team = asked.calibration, asked.compensate, asked.wanted, asked.team
    sites = check_substitutable(model, calibration, compensate)
    swapped = compensate is None and wanted is None
    soft = soft_sites(sites, tolerance, targets, refused=not force and swapped)
    report = SubstitutionReport(sites, tolerance, forced=bool(soft) and swapped)
    team.same({"compensate": compensate, "hinges": wanted, "force": force}, "what is asked for")
    check_same_weights(team, model)
    if compensate is not None and calibration is not None:
        _refit(model, calibration, compensate, report, 0 if force else len(soft), asked)
    else:
        _measure(model, report, asked, [] if force else [site.name for site in soft])
    check_same_weights(team, model)
    _attach_report(model, report)
    save_hardness_with_adapters(model)
    return report


def _refit(
    model: nn.Module,
    calibration: Iterable[Any],
    compensate: Compensate,
    report: SubstitutionReport,
    refused: int,
    asked: _Asked,
) -> None:
    """Refit the maps, measure what ReLU then changes, fold what stays smooth; the model is as it was if any of it fails.

    Args:
        refused: how many soft gates there are that only a refit makes good.
    """
    stay, team = hard_coded_sites(model), asked.team
    wider = None if asked.wanted is None else partial(HingeWork, wanted=asked.wanted)
    with compensation(model, calibration, wider, team) as work:
        with measuring(model):
            report.compensation = work.run(compensate)
            if refused and not report.compensation.sites:
                name, reason = next(iter(report.compensation.uncompensated.items()))
                raise SoftGateError(
                    f"{refused} gates are soft, and the map after none of the sites can be refit ({name}: {reason}). "
                    "force=True substitutes all the same"
                )
            change = _changed_by(work.networks, asked.compute_metrics)
            _note(report, change)
            _fold(model, stay, work.networks.batches.shown(0), report)
        if isinstance(work.wider, HingeWork):
            report.hinges = work.wider.finish()
        _put_relu(model, report, _run(model, change, report))


def _changed_by(
    networks: TwoNetworks, compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
) -> MeasuredChange:
    """How far the substituted network is from the smooth one, on the whole calibration set."""
    count, states = networks.batches.count, (networks.smooth, networks.substituted)
    batches = map(networks.batches.get, range(count))
    return measure_change(networks.model, batches, *states, compute_metrics, count, networks.team)


def _widen(model: nn.Module, report: SubstitutionReport, wanted: Wanted, asked: _Asked, refused: Collection[str]) -> None:
    """Put minimax hinges in the place of the gates; measure, if there are batches to do so, what that changes.

    Args:
        refused: soft sites, for which one ReLU per neuron is no substitute.
    """
    stay = hard_coded_sites(model)
    change: MeasuredChange | None = None
    with measuring(model), minimax_hinges(model, asked.calibration, wanted, asked.team) as work:
        _check_single(work.report.single, refused)
        batches = work.networks.batches
        if batches.deal.order:
            change = _changed_by(work.networks, asked.compute_metrics)
            _note(report, change)
        _fold(model, stay, batches.shown(0) if batches.deal.order else None, report)
    report.hinges = work.finish()
    _put_relu(model, report, runs_by_part(model) if change is None else _run(model, change, report))


def _measure(model: nn.Module, report: SubstitutionReport, asked: _Asked, refused: Collection[str]) -> None:
    """Measure, if there are batches to do so, what ReLU, or several, changes; fold what stays smooth."""
    if asked.wanted is not None:
        _widen(model, report, asked.wanted, asked, refused)
        return
    stay, calibration, team = hard_coded_sites(model), asked.calibration, asked.team
    change: MeasuredChange | None = None
    if calibration is not None:
        with measuring(model):
            check_dealt(calibration, team)
            batches = model_batches(model, calibration, team)
            as_relu, total = partial(gates_as_relu, model), length(calibration)
            change = measure_change(model, batches, contextlib.nullcontext, as_relu, asked.compute_metrics, total, team)
            _note(report, change)
    _fold(model, stay, change.first[0] if change and change.first else None, report)
    _put_relu(model, report, runs_by_part(model) if change is None else _run(model, change, report))


def _check_single(single: Mapping[str, str], refused: Collection[str]) -> None:
    """SoftGateError where a soft gate would become one ReLU per neuron, without a refit that makes up for it."""
    left = [name for name in single if name in refused]
    if left:
        raise SoftGateError(
            f"{len(left)} soft gates would become one ReLU per neuron each, as their layers cannot be wider ({left[0]}: "
            f"{single[left[0]]}): pass calibration=… and compensate='least_squares', which refits them, or force=True"
        )


def _run(model: nn.Module, change: MeasuredChange, report: SubstitutionReport) -> Runs:
    """The run as ReLU that the network is held against; a fold moves it, by rounding and what it leaves smooth."""
    if change.first is None:
        return {}
    batch, output = change.first
    return {model: (batch, run_as_relu(model, batch) if report.folded else output)}


def _note(report: SubstitutionReport, change: MeasuredChange) -> None:
    """Put into the report what was measured."""
    report.relative_change, report.metrics, report.zeros = change.relative_change, change.metrics, change.zeros
    report.unreached = change.unreached


def _put_relu(model: nn.Module, report: SubstitutionReport, runs: Runs) -> None:
    """ReLU in the place of every λ-GELU, `relu` in the configs; the report gets what was changed and what remains.

    ReLU must be what then runs, see `check_relu_runs`.
    """
    replace_everywhere(model, hardness_sites(model).values(), lambda site: ACT2FN["relu"])
    for prefix, part in transformers_parts(model).items():
        for path, key in list(activation_attributes(part.config)):
            if key in LAMBDA_KEYS and set_activation(part, path, "relu", within=model) is not None:
                report.attributes[joined(prefix, path)] = key
    check_relu_runs(runs)
    report.left = [item for item in smooth_activations(model) if item.name not in report.folded]


def _attach_report(model: nn.Module, report: SubstitutionReport) -> None:
    """Leave the report with the model, where those who save it find it: λ is gone from the model itself."""
    inside = None if has_adapters(model) else wrapped_part(model)
    vars(model if inside is None else model.get_submodule(inside))["_relu_report"] = report  # what can be saved


def _fold(model: nn.Module, names: list[str], batch: Mapping[str, Any] | None, report: SubstitutionReport) -> None:
    if not names:
        return
    sites = hardness_sites(model)
    for name in names:
        keep(sites[name].unclipped_hardness)
        sites[name].set_hardness(FOLDED_HARDNESS)
    fold(model, batch, only=names)
    report.folded = {name: sup_error(FOLDED_HARDNESS, sites[name].base) for name in names}
