"""`convert`: a pretrained GELU or SiLU model becomes a λ-GELU model with the same function."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .activation import LambdaGELU, hardness_sites
from .bases import BASES
from .discovery import (
    LAMBDA_KEYS,
    STOCK_KEYS,
    Governed,
    base_of,
    get_attribute,
    governed_modules,
    is_activation,
    named_modules,
    own_config,
    set_attribute,
)
from .functional import check_hardness
from .inventory import Unconverted, smooth_activations


class ConversionError(ValueError):
    """The model cannot be converted; the message says what was seen and what to do. The model is as it was."""


@dataclass(frozen=True)
class Site:
    """One converted activation: module name, the stock activation it was, its base, the config attribute that governs it."""

    name: str
    was: str
    base: str
    attribute: str


@dataclass
class ConversionReport:
    """What `convert` did. Printing it gives the table."""

    sites: list[Site] = field(default_factory=list)
    unconverted: list[Unconverted] = field(default_factory=list)
    attributes: dict[str, tuple[str, str]] = field(default_factory=dict)  # path → (value before, value after)
    hardness: float = 1.0

    def __str__(self) -> str:
        lines = [f"converted {len(self.sites)} activations to λ-GELU at λ = {self.hardness:g}"]
        for path, (before, after) in self.attributes.items():
            names = [site.name for site in self.sites if site.attribute == path]
            span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            lines.append(f"  config.{path}: {before} → {after}   {len(names)} × {span}")
        if self.unconverted:
            lines.append(f"{len(self.unconverted)} left as they are")
            lines += [f"  {item}" for item in self.unconverted]
        return "\n".join(lines)


def convert(model: PreTrainedModel, init_hardness: float = 1.0) -> ConversionReport:
    """Replace, in place, the GELU-family activations of `model` by λ-GELU, weights untouched.

    A site is converted when a config attribute governs it, so that the config can say `lambda_gelu` now and `relu` after
    `relu_ize`, and stock transformers rebuilds the same network. Each site keeps its own base (erf, tanh, quick, SiLU); at
    the default λ = 1 the model computes what it computed before. Only this instance is changed.

    Args:
        model: any transformers model, on any device, in any dtype.
        init_hardness: λ to start from, ≥ 1. The paper's 1 + ln 2 ≈ 1.693 changes the function of a pretrained model.

    Returns:
        The sites converted, and every GELU or SiLU that was seen and left, with the reason.

    Raises:
        ConversionError: nothing to convert, already converted, or config and modules disagree. The model is unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(
            f"convert expects a transformers PreTrainedModel, got {type(model).__name__}: its config is what a converted "
            "checkpoint is rebuilt from. For a wrapped model pass the model inside"
        )
    check_hardness(init_hardness)
    if hardness_sites(model):
        raise ConversionError(
            f"the model is converted already: it has {len(hardness_sites(model))} λ-GELU modules; "
            "change their hardness with set_hardness, or load the original checkpoint again"
        )
    modules = dict(named_modules(model))
    governed = governed_modules(model)
    _check_agreement(modules, governed)

    report = ConversionReport(hardness=float(init_hardness))
    claimed: set[str] = set()
    if any(attribute.modules and attribute.value in STOCK_KEYS for attribute in governed):
        own_config(model)
    for attribute in governed:
        if attribute.failure:
            reason = f"the model cannot be rebuilt with another activation there ({attribute.failure})"
            report.unconverted.append(Unconverted(f"config.{attribute.path}", attribute.value, reason))
        if not attribute.modules or attribute.value in LAMBDA_KEYS:
            continue
        base = STOCK_KEYS[attribute.value]
        key = BASES[base].key
        if not set_attribute(model.config, attribute.path, key):
            reason = f"config.{attribute.path} is derived from other attributes and would not survive a reload"
            report.unconverted += [Unconverted(n, attribute.value, reason) for n in attribute.modules]
            claimed.update(attribute.modules)
            continue
        update_config_copies(model, attribute.path, attribute.value, key)
        report.attributes[attribute.path] = (attribute.value, key)
        for name in attribute.modules:
            claimed.add(name)
            if isinstance(model.get_submodule(name), LambdaGELU):  # a block that several names share has it already
                continue
            made = LambdaGELU(init_hardness, base=base)
            made.stock_key = attribute.value
            replace_module(model, name, made)
            made._is_hf_initialized = True  # a later init_weights() leaves it alone
            report.sites.append(Site(name, attribute.value, base, attribute.path))
    order = {name: index for index, name in enumerate(modules)}
    report.sites.sort(key=lambda site: order[site.name])
    report.unconverted += smooth_activations(model, claimed, report.attributes)
    if not report.sites:
        raise ConversionError(_nothing(model, report))
    return report


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place called `name`, on the device and in the train/eval mode of what was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    new.train(getattr(parent, leaf).training)
    tensor = next(parent.parameters(), None)
    if tensor is None:
        tensor = next(model.parameters(), torch.empty(0))
    setattr(parent, leaf, new.to(tensor.device))


def update_config_copies(model: PreTrainedModel, path: str, before: str, after: str) -> None:
    """Carry a change of `model.config` into the copies of that config that submodules hold.

    Encoder and decoder of T5 hold deep copies; code of theirs that reads the attribute in forward must see the change.
    """
    parent, _, leaf = path.rpartition(".")
    owner = get_attribute(model.config, parent) if parent else model.config
    for module in model.modules():
        config = getattr(module, "config", None)
        is_copy = isinstance(config, PreTrainedConfig) and config is not owner and type(config) is type(owner)
        if is_copy and getattr(config, leaf, None) == before:
            set_attribute(config, leaf, after)


def _check_agreement(modules: dict[str, nn.Module], governed: list[Governed]) -> None:
    for attribute in governed:
        base = STOCK_KEYS.get(attribute.value) or LAMBDA_KEYS[attribute.value]
        for name in attribute.modules:
            seen = modules.get(name)
            if seen is None or base_of(seen) != base:
                got = "missing" if seen is None else type(seen).__name__
                raise ConversionError(
                    f"config and model disagree: config.{attribute.path} = {attribute.value!r} governs {name}, which is "
                    f"{got} in the model. Was the model or its config edited after loading? Load it again, or set the "
                    "config to what the model is"
                )


def _nothing(model: PreTrainedModel, report: ConversionReport) -> str:
    seen: dict[str, int] = {}
    for _, module in named_modules(model):
        if is_activation(module):
            seen[type(module).__name__] = seen.get(type(module).__name__, 0) + 1
    activations = ", ".join(f"{count} × {name}" for name, count in seen.items()) or "no activation module"
    text = f"nothing to convert in {type(model).__name__}: saw {activations}"
    if set(seen) <= {"ReLU", "Tanh", "Sigmoid"} and "ReLU" in seen:
        text += "; the model is a ReLU network already"
    if report.unconverted:
        text += "; not convertible: " + "; ".join(map(str, report.unconverted[:5]))
    return text
