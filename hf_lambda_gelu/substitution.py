"""`relu_ize`: λ-GELU becomes ReLU, with a report of what that changes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.trainer_pt_utils import nested_concat

from .activation import hardness_profile, hardness_sites
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
    relative_change: float | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)  # name → (before, after)

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
        if self.relative_change is not None:
            lines.append(f"  outputs changed by {self.relative_change:.2e} (relative, root mean square)")
        lines += [f"  {name}: {before:.4f} → {after:.4f}" for name, (before, after) in self.metrics.items()]
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` is in eval mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def relu_ize(
    model: PreTrainedModel,
    force: bool = False,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> SubstitutionReport:
    """Replace, in place, every λ-GELU by ReLU and let the config say `relu`, so that stock transformers loads the model.

    Args:
        model: a converted model, hardened by `LambdaGELUTrainer` or otherwise.
        force: substitute soft gates too. This is the naive swap: it costs a pretrained model several points.
        tolerance: ε; gates with λ < `target_hardness(ε)` count as soft. Give the one that the run was trained with.
        calibration: batches (mappings that the model's forward takes) on which the change of the outputs is measured, and of
            the loss if they hold labels. Iterated once; the model is only run, without gradients, in eval mode.
        compute_metrics: as for `Trainer`; measured before and after, on batches with labels.

    Returns:
        Per site λ and the bound on what changes; the measured changes; the smooth activations that remain.

    Raises:
        ValueError: no λ-GELU in the model, or a calibration set without a usable batch.
        SoftGateError: soft gates and not `force`.
        In every case, and if the model's forward raises on a batch, the model is as it was.
    """
    if any(site.raw_hardness.is_meta for site in hardness_sites(model).values()):
        raise ValueError("the model is on the meta device, where λ has no value: load its weights first")
    profile = hardness_profile(model)
    if not profile:
        smooth = smooth_activations(model)
        hint = "call convert(model) and train first" if smooth else "it is a ReLU model already, or never was converted"
        raise ValueError(f"{type(model).__name__} has no λ-GELU to replace: {hint}")
    modules = hardness_sites(model)
    soft = {
        name: value
        for name, value in profile.items()
        if value < target_hardness(tolerance, modules[name].base) * (1.0 - _SLACK)
    }
    if soft and not force:
        name, value = min(soft.items(), key=lambda item: item[1])
        wanted = target_hardness(tolerance, modules[name].base)
        raise SoftGateError(
            f"{len(soft)} of {len(profile)} gates are soft for tolerance {tolerance:g}: {name} has λ = {value:.4g}, "
            f"expected at least {wanted:.4g}. Finish the ramp, pass the tolerance it was trained for, or force=True "
            "to substitute all the same"
        )
    sites = [
        SubstitutedSite(name, modules[name].base, value, sup_error(value, modules[name].base))
        for name, value in profile.items()
    ]
    report = SubstitutionReport(sites, tolerance, forced=bool(soft))
    if calibration is not None:
        _measure(model, calibration, compute_metrics, report)

    for name, module in list(model.named_modules(remove_duplicate=False)):
        if any(module is site for site in modules.values()):
            replace_module(model, name, ACT2FN["relu"])
    own_config(model)
    for path, key in list(activation_attributes(model.config)):
        if key in LAMBDA_KEYS and set_attribute(model.config, path, "relu"):
            update_config_copies(model, path, key, "relu")
            report.attributes[path] = key
    report.left = smooth_activations(model)
    model._relu_report = report  # for save_relu_pretrained: λ is gone from the model itself
    return report


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    calibration: Iterable[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    report: SubstitutionReport,
) -> None:
    accepted = set(inspect.signature(model.forward).parameters)
    change = norm = 0.0
    count = 0
    losses: list[tuple[float, float]] = []
    logits: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    with evaluating(model):
        for batch in calibration:
            if not isinstance(batch, Mapping):
                raise ValueError(f"a calibration batch must be a mapping of the model's inputs, got {type(batch).__name__}")
            batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in accepted}
            batch.pop("return_dict", None)
            if not any(isinstance(value, Tensor) for value in batch.values()):
                raise ValueError(f"no tensor in a calibration batch is an input of {type(model).__name__}.forward")
            smooth = model(**batch, return_dict=True)
            with gates_as_relu(model):
                hard = model(**batch, return_dict=True)
            before, after = main_output(smooth), main_output(hard)
            change += float((after.double() - before.double()).square().sum())
            norm += float(before.double().square().sum())
            count += 1
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
    if not count:
        raise ValueError("the calibration set yielded no batch: a generator that was consumed before, or an empty loader?")
    report.relative_change = (change / norm) ** 0.5 if norm else 0.0
    if losses:
        report.metrics["loss"] = tuple(sum(column) / len(losses) for column in zip(*losses, strict=True))  # type: ignore[assignment]
    if logits is not None:
        first, second = (compute_metrics(EvalPrediction(side.numpy(), labels.numpy())) for side in logits)
        report.metrics.update({name: (first[name], second[name]) for name in first})


def main_output(output: Mapping[str, Any]) -> Tensor:
    """The logits of a model output, or its first floating point tensor other than the loss."""
    if isinstance(output.get("logits"), Tensor):
        return output["logits"]
    for name, value in output.items():
        if name != "loss" and isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"the model's output holds no tensor to compare: {', '.join(output)}")
