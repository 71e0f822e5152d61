"""`convert`: a pretrained GELU or SiLU network becomes a λ-GELU network with the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from ..activation.bases import BASES
from ..activation.hardness import check_hardness
from ..activation.module import LambdaGELU, hardness_sites
from ..reports import span
from ..structure.config import LAMBDA_KEYS, STOCK_KEYS
from ..structure.config_probe import Governed, governed_modules
from ..structure.edits import replace_module, set_activation
from ..structure.forwards import bypassed_by_code, has_foreign_forwards, refusal
from ..structure.kept_functions import function_of_torch_layer, stock_module
from ..structure.modules import base_of, is_activation, joined, named_modules, probed_base, transformers_parts
from ..structure.offloading import check_not_offloaded
from ..structure.smooth_activations import Unconverted, smooth_activations
from ..structure.transaction import transaction
from ..structure.usable import check_usable
from .adapter_hardness import save_hardness_with_adapters


class ConversionError(ValueError):
    """The model cannot be converted; the message says what was seen and what to do. The model is as it was."""


@dataclass(frozen=True)
class Site:
    """One converted activation: module name, what it was, its base, the config attribute that governs it ("": none)."""

    name: str
    was: str
    base: str
    attribute: str


@dataclass
class ConversionReport:
    """What `convert` did. Printing it gives the table.

    Attributes:
        sites: each with `name`, `was`, `base`, and `attribute`, the config path that governs it ("" if none does).
        unconverted: activations that were left, with the reason.
        attributes: config path → (value before, value now).
        hardness: λ of all sites.
    """

    sites: list[Site] = field(default_factory=list)
    unconverted: list[Unconverted] = field(default_factory=list)
    attributes: dict[str, tuple[str, str]] = field(default_factory=dict)
    hardness: float = 1.0

    def __str__(self) -> str:
        lines = [f"converted {len(self.sites)} activations to λ-GELU at λ = {self.hardness:g}"]
        for path, (before, after) in self.attributes.items():
            names = [site.name for site in self.sites if site.attribute == path]
            lines.append(f"  config.{path}: {before} → {after}   {len(names)} × {span(names)}")
        free = [site.name for site in self.sites if not site.attribute]
        if free:
            lines.append(f"  no config attribute governs   {len(free)} × {span(free)}")
        if self.unconverted:
            lines.append(f"{len(self.unconverted)} left as they are")
            lines += [f"  {item}" for item in self.unconverted]
        return "\n".join(lines)


@transaction
def convert(
    model: nn.Module,
    init_hardness: float = 1.0,
    *,
    hard_coded: bool = False,
    only: Callable[[str, nn.Module], bool] | None = None,
) -> ConversionReport:
    """Replace, in place, the GELU-family activations of `model` by λ-GELU, f(x; λ) = x Φ(λx); weights stay.

    In a transformers model a site is converted when a config attribute governs it, so that the config can say `lambda_gelu`
    now and `relu` after `relu_ize`, and stock transformers rebuilds the same network. In any other module (timm's, your own)
    every GELU and SiLU module is a site, and the function that torch's transformer layers hold by default; transformers
    models inside it (PEFT's, sentence-transformers') are treated as such.
    Each site keeps its own base (erf, tanh, quick, SiLU); at the default λ = 1 the model computes what it computed before.
    Only this instance is changed. λ-GELU is the paper's (arXiv 2603.21991); how sites are found is derived.

    Args:
        model: any module, on any device, in any dtype. Its λ are fp32, shape (1,), one a site.
        init_hardness: λ to start from, ≥ 1. The paper's 1 + ln 2 ≈ 1.693 changes the function of a pretrained model.
        hard_coded: convert the modules of a transformers model too that no config attribute governs (BLOOM's). A stock
            reload cannot be ReLU there: `relu_ize` folds them at λ = 2¹⁴. Their λ does not survive `save_pretrained`.
        only: (module name, module) → whether to convert it. Modules that one config attribute governs go together. It is for
            parts: `convert(model.encoder)` changes a config of the part's own, of which that of the whole knows nothing.

    Returns:
        The sites converted, and every GELU or SiLU that was seen and left, with the reason.

    Raises:
        ValueError: `init_hardness` is no finite number ≥ 1.
        ConversionError: called in torch.inference_mode, nothing to convert, already converted, offloaded weights, made by
            torch.jit, config and modules disagree, a fused kernel's forward that calls no activation, or `only` takes no
            module, or some of those that one config attribute governs. The model is unchanged.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2))
        >>> report = hlg.convert(model)
        >>> len(report.sites), model.config.hidden_act
        (2, 'lambda_gelu')
    """
    parts = _convertible_parts(model, init_hardness)
    governed = {prefix: governed_modules(part) for prefix, part in parts.items()}
    for prefix, part in parts.items():
        _check_agreement(dict(named_modules(part)), governed[prefix])
    chosen = _Chosen(model, only)
    for prefix, attributes in governed.items():
        for attribute in attributes:
            chosen.check_whole(prefix, attribute)
    _check_forwards(model, [n for n in _candidates(model, governed, hard_coded) if n not in chosen.left])
    conversion = _Conversion(model, chosen, ConversionReport(hardness=float(init_hardness)))
    for prefix, part in parts.items():
        for attribute in governed[prefix]:
            conversion.governed(prefix, part, attribute)
    conversion.free(() if hard_coded else tuple(parts))
    save_hardness_with_adapters(model)
    return conversion.finished()


def _convertible_parts(model: nn.Module, init_hardness: float) -> dict[str, PreTrainedModel]:
    """The transformers models in `model`, after the checks that need no look at them."""
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert expects a torch module, got {type(model).__name__}: load the model first")
    check_hardness(init_hardness)
    try:
        check_not_offloaded(model)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    check_usable(model, ConversionError)
    _check_no_script(model)
    if hardness_sites(model):
        raise ConversionError(
            f"the model is converted already: it has {len(hardness_sites(model))} λ-GELU modules; "
            "change their hardness with set_hardness, or load the original checkpoint again"
        )
    return transformers_parts(model)


def _check_no_script(model: nn.Module) -> None:
    """ConversionError where TorchScript has compiled a module with activations: what is in it cannot be replaced."""
    for name, module in model.named_modules():
        compiled = isinstance(module, torch.jit.ScriptModule)
        if compiled and any(probed_base(part) is not None for part in module.modules() if part is not module):
            raise ConversionError(
                f"{name or 'the model'} was made by torch.jit, and what is in it cannot be replaced: convert the module "
                "that it was made from, and call torch.jit.trace afterwards"
            )


class _Chosen:
    """What `only` takes; everything without it."""

    def __init__(self, model: nn.Module, only: Callable[[str, nn.Module], bool] | None) -> None:
        self.only = only
        self.modules = dict(named_modules(model))
        self.left: set[str] = set()

    def __call__(self, name: str, module: nn.Module) -> bool:
        taken = self.only is None or bool(self.only(name, module))
        if not taken:
            self.left.add(name)
        return taken

    def check_whole(self, prefix: str, attribute: Governed) -> None:
        names = [joined(prefix, name) for name in attribute.modules]
        taken = [name for name in names if self(name, self.modules[name])]
        if taken and len(taken) < len(names):
            other = next(name for name in names if name not in taken)
            raise ConversionError(
                f"`only` takes {taken[0]} but not {other}: config.{attribute.path} governs both, and a checkpoint can say "
                "one thing only of them. Take all of its modules, or none"
            )


class _Conversion:
    """Converts site after site, and keeps what to report.

    Attributes:
        claimed: names of modules that are λ-GELU now, or stay what they are for a reason that the report holds.
    """

    def __init__(self, model: nn.Module, chosen: _Chosen, report: ConversionReport) -> None:
        self.model, self.chosen, self.report = model, chosen, report
        self.claimed: set[str] = set()

    def governed(self, prefix: str, part: PreTrainedModel, attribute: Governed) -> None:
        """Convert the modules that a config attribute of `part`, the model's part of that name, governs."""
        names = [joined(prefix, name) for name in attribute.modules]
        path = joined(prefix, attribute.path)
        if attribute.failure:
            reason = f"the model cannot be rebuilt with another activation there: {attribute.failure}"
            self.report.unconverted.append(Unconverted(f"config.{path}", attribute.value, reason))
        if not names or attribute.value in LAMBDA_KEYS or names[0] in self.chosen.left:
            return
        base = STOCK_KEYS[attribute.value]
        key = BASES[base].key
        self.claimed.update(names)
        if set_activation(part, attribute.path, key, within=self.model) is None:
            reason = f"config.{path} is derived from other attributes and would not survive a reload"
            self.report.unconverted += [Unconverted(n, attribute.value, reason) for n in names]
            return
        self.report.attributes[path] = (attribute.value, key)
        for name in names:
            self._put(name, base, path, attribute.value)

    def free(self, parts: tuple[str, ...]) -> None:
        """Convert every GELU and SiLU module that is left, outside the parts of these names."""
        for name, module in list(named_modules(self.model)):
            inside = any(not prefix or name.startswith(f"{prefix}.") for prefix in parts)
            if not inside:
                self._function(name, module)
            if not inside and name and name not in self.claimed and self.chosen(name, module):
                base = probed_base(module)
                if base is not None:
                    self.claimed.add(name)
                    self._put(name, base)

    def _function(self, name: str, module: nn.Module) -> None:
        """Convert what one of torch's transformer layers keeps as a function: by default they hold no module."""
        kept = function_of_torch_layer(module)
        stock = None if kept is None else stock_module(kept.base)
        place = joined(name, "activation")
        if kept is not None and stock is not None and place not in self.claimed and self.chosen(place, stock):
            module.activation = stock
            self._put(place, kept.base)
            self.claimed.add(place)

    def finished(self) -> ConversionReport:
        """The report, with what was left; ConversionError if nothing was converted."""
        order = {name: index for index, (name, _) in enumerate(named_modules(self.model))}
        self.report.sites.sort(key=lambda site: order[site.name])
        self.report.unconverted += [
            Unconverted(item.name, item.what, "`only` does not take it") if item.name in self.chosen.left else item
            for item in smooth_activations(self.model, self.claimed, list(self.report.attributes))
        ]
        if not self.report.sites:
            raise ConversionError(_nothing(self.model, self.report, self.chosen))
        return self.report

    def _put(self, name: str, base: str, attribute: str = "", key: str = "") -> None:
        """Put a λ-GELU in the place called `name`; `attribute` and `key`: what governs it, and what that said."""
        before = self.model.get_submodule(name)
        if isinstance(before, LambdaGELU):  # a block that several names share has it already
            return
        with torch.device("cpu"):  # not on meta, where it would have no value; it is put beside what was there
            made = LambdaGELU(self.report.hardness, base=base)
        made.stock_key = key
        if not key:
            vars(made)["replaced"] = before  # past nn.Module, for which it would be a child
        replace_module(self.model, name, made)
        made._is_hf_initialized = True  # a later init_weights() leaves it alone
        self.report.sites.append(Site(name, key or type(before).__name__, base, attribute))


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


def _candidates(model: nn.Module, governed: Mapping[str, list[Governed]], hard_coded: bool) -> Iterator[str]:
    """The modules that may become sites, where a forward in the model is not its class's own; none elsewhere."""
    if not has_foreign_forwards(model):
        return
    claimed = {
        joined(p, name) for p, attributes in governed.items() for attribute in attributes for name in attribute.modules
    }
    for name, module in named_modules(model):
        inside = not hard_coded and any(not prefix or name.startswith(f"{prefix}.") for prefix in governed)
        if name and (name in claimed or (not inside and probed_base(module) is not None)):
            yield name
        if not inside and function_of_torch_layer(module) is not None:
            yield joined(name, "activation")


def _check_forwards(model: nn.Module, sites: list[str]) -> None:
    """ConversionError where the code of a forward that was put in the place of another shows that it calls no activation."""
    reasons = bypassed_by_code(model, sites)
    if reasons:
        raise ConversionError(f"{refusal(reasons)}. Converting would change nothing there. The model is as it was")


def _nothing(model: nn.Module, report: ConversionReport, chosen: _Chosen) -> str:
    seen: dict[str, int] = {}
    for _, module in named_modules(model):
        if is_activation(module):
            seen[type(module).__name__] = seen.get(type(module).__name__, 0) + 1
    activations = ", ".join(f"{count} × {name}" for name, count in seen.items()) or "no activation module"
    text = f"nothing to convert in {type(model).__name__}: saw {activations}"
    if chosen.left:
        text += f"; `only` took none of {len(chosen.modules)} modules, whose names are like {sorted(chosen.left)[0]!r}"
    if set(seen) <= {"ReLU", "Tanh", "Sigmoid"} and "ReLU" in seen:
        text += "; the model is a ReLU network already"
    if report.unconverted:
        text += "; not convertible: " + "; ".join(map(str, report.unconverted[:5]))
    return text
