"""`relu_ize`: λ-GELU becomes ReLU, with a report of what that changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.trainer_pt_utils import nested_concat

from .activation import hardness_profile, hardness_sites
from .batches import main_output, model_batches, rows, token_mask
from .calibration import decoder_modules, measuring, run_batch
from .compensation import Compensate, CompensationReport, compensation
from .conversion import replace_module, update_config_copies
from .discovery import LAMBDA_KEYS, activation_attributes, own_config, put_attribute, set_attribute
from .hardening import DEFAULT_TOLERANCE, sup_error, target_hardness
from .inventory import Unconverted, smooth_activations

# a ramp ends at its target to fp32's accuracy, not to the last bit
_SLACK = 1e-3


class SoftGateError(RuntimeError):
    """Gates are too soft for ReLU to take their place unnoticed. The model is as it was."""


@dataclass(frozen=True)
class SubstitutedSite:
    """One site: its λ before substitution and sup |f − ReLU| = c / λ in units of the pre-activation."""

    name: str
    base: str
    hardness: float
    sup_error: float


@dataclass
class SubstitutionReport:
    """What `relu_ize` did. Printing it gives the table; `to_dict` what a JSON file can hold."""

    sites: list[SubstitutedSite]
    tolerance: float
    forced: bool = False
    attributes: dict[str, str] = field(default_factory=dict)  # config path → λ key before
    left: list[Unconverted] = field(default_factory=list)
    compensation: CompensationReport | None = None
    relative_change: float | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)  # name → (before, after)
    zeros: dict[str, float] = field(default_factory=dict)  # site → fraction of what its ReLU puts out, padding left out

    @property
    def profile(self) -> dict[str, float]:
        """{module name: λ before substitution}, in network order."""
        return {site.name: site.hardness for site in self.sites}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(site.name) for site in self.sites)
        lines = [f"{len(self.sites)} activations are ReLU now" + (" (forced: gates were soft)" if self.forced else "")]
        lines.append(f"  {'site':<{width}}  {'λ before':>10}  sup |f − ReLU|")
        lines += [f"  {s.name:<{width}}  {s.hardness:>10.4g}  {s.sup_error:.2g}" for s in self.sites]
        if self.compensation is not None:
            lines.append(str(self.compensation))
        if self.relative_change is not None:
            lines.append(f"  outputs changed by {self.relative_change:.2e} (relative, root mean square)")
        lines += [f"  {name}: {before:.4f} → {after:.4f}" for name, (before, after) in self.metrics.items()]
        if self.zeros:
            values = list(self.zeros.values())
            mean = sum(values) / len(values)
            lines.append(f"  zeros in what the ReLUs put out: {mean:.0%}, by site {min(values):.0%} to {max(values):.0%}")
        if self.left:
            lines += [f"{len(self.left)} smooth activations remain"] + [f"  {item}" for item in self.left]
        return "\n".join(lines)


@contextlib.contextmanager
def gates_as_relu(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` computes what it will after `relu_ize`; nothing is replaced and λ is kept. Blocks may nest.

    The config says `relu` within the block too, for code that makes a fresh activation from it in forward.
    """
    sites = {site: site.as_relu for site in hardness_sites(model).values()}
    configs = {id(c): c for module in model.modules() if isinstance(c := getattr(module, "config", None), PreTrainedConfig)}
    lookups = [(c, path, key) for c in configs.values() for path, key in activation_attributes(c) if key in LAMBDA_KEYS]
    for site in sites:
        site.as_relu = True
    for config, path, _ in lookups:
        put_attribute(config, path, "relu")
    try:
        yield
    finally:
        for site, before in sites.items():
            site.as_relu = before
        for config, path, key in lookups:
            put_attribute(config, path, key)


def relu_ize(
    model: PreTrainedModel,
    force: bool = False,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    targets: Mapping[str, float] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    compensate: Compensate | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> SubstitutionReport:
    """Replace, in place, every λ-GELU by ReLU and let the config say `relu`, so that stock transformers loads the model.

    Args:
        model: a converted model, at any λ.
        force: substitute soft gates too. This is the naive swap: it costs a pretrained model several points.
        tolerance: ε; gates with λ < `target_hardness(ε)` count as soft. Give the one that the run was trained with.
        targets: {module name: λ} below which a gate counts as soft, in place of `tolerance`: `trainer.hardness_targets` of a
            run with `hardness_target="calibrated"`, or `calibrate(…).targets(…)`.
        calibration: batches (mappings that the model's forward takes) like those that the model will meet. The change of the
            outputs and the zeros of each ReLU are measured on them, and the loss if they hold labels. Iterated once.
        compensate: "least_squares" refits, from the calibration batches and without labels, the linear map after each
            activation, so that the network computes with ReLU what it computed before (see `compensation`); "bias" only
            shifts that map's bias. Soft gates are what it is for: `force` is not needed.
        compute_metrics: as for `Trainer`; measured before and after, on batches with labels.

    Returns:
        Per site λ and the bound on what changes; what was refit; the measured changes; the smooth activations that remain.

    Raises:
        ValueError: no λ-GELU in the model, or a `compensate` that is unknown or lacks a calibration set.
        CalibrationError: a calibration set that cannot be used, or on which the model's forward raises.
        SoftGateError: soft gates, and neither `force` nor `compensate`.
        In every case the model is as it was.
    """
    if compensate not in (None, *get_args(Compensate)):
        raise ValueError(f"unknown compensate={compensate!r}: expected 'least_squares', 'bias' or None")
    if compensate is not None and calibration is None:
        raise ValueError(
            f"compensate={compensate!r} learns from data: pass calibration=…, batches like those that the model will meet. "
            "A few hundred unlabelled examples do"
        )
    sites = _check_sites(model)
    report = SubstitutionReport(sites, tolerance)
    wanted = {s.name: target_hardness(tolerance, s.base) for s in sites} if targets is None else targets
    missing = [s.name for s in sites if s.name not in wanted]
    if missing:
        raise ValueError(f"targets names no λ for {len(missing)} of {len(sites)} sites, {missing[0]} the first of them")
    soft = [s for s in sites if s.hardness < wanted[s.name] * (1.0 - _SLACK)]
    if soft and not force and compensate is None:
        worst = min(soft, key=lambda site: site.hardness / wanted[site.name])
        measure = f"tolerance {tolerance:g}" if targets is None else "their targets"
        raise SoftGateError(
            f"{len(soft)} of {len(sites)} gates are soft for {measure}: {worst.name} has λ = {worst.hardness:.4g}, "
            f"expected at least {wanted[worst.name]:.4g}. Finish the ramp, pass the tolerance or targets of the run, "
            "compensate='least_squares' with a calibration set, or force=True to substitute all the same"
        )
    report.forced = bool(soft) and compensate is None
    if compensate is not None:
        with measuring(model), compensation(model, calibration) as work:
            report.compensation = work.run(compensate)
            batches = map(work.batch, range(work.count))
            _measure(model, batches, work.smooth, work.substituted, compute_metrics, report)
    elif calibration is not None:
        with measuring(model):
            batches = model_batches(model, calibration)
            _measure(model, batches, contextlib.nullcontext, lambda: gates_as_relu(model), compute_metrics, report)

    modules = set(hardness_sites(model).values())
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in modules:
            replace_module(model, name, ACT2FN["relu"])
    own_config(model)
    for path, key in list(activation_attributes(model.config)):
        if key in LAMBDA_KEYS and set_attribute(model.config, path, "relu"):
            update_config_copies(model, path, key, "relu")
            report.attributes[path] = key
    report.left = smooth_activations(model)
    model._relu_report = report  # for save_relu_pretrained: λ is gone from the model itself
    return report


def _check_sites(model: PreTrainedModel) -> list[SubstitutedSite]:
    if any(site.raw_hardness.is_meta for site in hardness_sites(model).values()):
        raise ValueError("the model is on the meta device, where λ has no value: load its weights first")
    profile = hardness_profile(model)
    if not profile:
        smooth = smooth_activations(model)
        hint = "call convert(model) first" if smooth else "it is a ReLU model already, or never was converted"
        raise ValueError(f"{type(model).__name__} has no λ-GELU to replace: {hint}")
    bases = {name: site.base for name, site in hardness_sites(model).items()}
    return [SubstitutedSite(name, bases[name], value, sup_error(value, bases[name])) for name, value in profile.items()]


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    before_: Callable[[], AbstractContextManager[None]],
    after_: Callable[[], AbstractContextManager[None]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    report: SubstitutionReport,
) -> None:
    """Run the model on each batch within both contexts, and put what differs into the report."""
    change = norm = 0.0
    losses: list[tuple[float, float]] = []
    logits: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    zeros = _Zeros(model)
    for index, batch in enumerate(batches):
        with before_():
            smooth = run_batch(model, batch, index)
        with after_(), zeros.counting(batch):
            hard = run_batch(model, batch, index)
        before, after = main_output(smooth), main_output(hard)
        for first, second in zip(before, after, strict=True):  # one by one: a language model's logits are large
            change += float((second.float() - first.float()).square().sum(dtype=torch.float64))
            norm += float(first.float().square().sum(dtype=torch.float64))
        if batch.get("labels") is not None:
            if smooth.get("loss") is not None:
                size = len(batch["labels"])  # the mean over examples, as the Trainer reports it
                losses += [(float(smooth["loss"]), float(hard["loss"]))] * size
            if compute_metrics is None:
                continue
            # of unequal length under dynamic padding: padded with −100, as the Trainer does
            both, truth = (before.float().cpu(), after.float().cpu()), batch["labels"].cpu()
            logits = both if logits is None else nested_concat(logits, both)
            labels = truth if labels is None else nested_concat(labels, truth)
    report.zeros = zeros.fractions()
    report.relative_change = (change / norm) ** 0.5 if norm else 0.0
    if losses:
        report.metrics["loss"] = tuple(sum(column) / len(losses) for column in zip(*losses, strict=True))  # type: ignore[assignment]
    if logits is not None:
        first, second = (compute_metrics(EvalPrediction(side.numpy(), labels.numpy())) for side in logits)
        report.metrics.update({name: (first[name], second[name]) for name in first})


class _Zeros:
    """Counts, by site, what a ReLU makes 0."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.sites = hardness_sites(model)
        self.decoder = decoder_modules(model)
        self.counts = {name: [0, 0] for name in self.sites}  # zeros, elements

    @contextlib.contextmanager
    def counting(self, batch: Mapping[str, Any]) -> Iterator[None]:
        masks = {in_decoder: token_mask(batch, in_decoder) for in_decoder in (False, True)}

        def watch(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = rows(args[0], masks[module in self.decoder])
            self.counts[name][0] += int((x <= 0).sum())
            self.counts[name][1] += x.numel()

        with contextlib.ExitStack() as hooks:
            for name, site in self.sites.items():
                hooks.enter_context(site.register_forward_pre_hook(partial(watch, name)))
            yield

    def fractions(self) -> dict[str, float]:
        """Without the sites that no batch reached."""
        return {name: zeros / total for name, (zeros, total) in self.counts.items() if total}
