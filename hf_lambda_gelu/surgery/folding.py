"""`fold`: λ goes into the weights; what is left is a stock GELU model that computes the same.

f(x; λ) = a(λx) / λ: scale what makes x by λ, and what takes the output up by 1/λ. [derived]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..activation.bases import BASES
from ..activation.module import LambdaGELU, hardness_sites
from ..measurement.difference import difference, float_outputs, tolerance
from ..measurement.examples.choice import example_inputs
from ..measurement.forward import call, evaluating, same_random_numbers
from ..reports import progress
from ..structure.config import LAMBDA_KEYS, STOCK_KEYS, activation_attributes
from ..structure.edits import replace_everywhere, set_activation
from ..structure.hooks import Hooks
from ..structure.linear_maps import eager_experts
from ..structure.modules import joined, transformers_parts
from ..structure.offloading import check_not_offloaded
from ..structure.quantised import quantised_weight
from ..structure.sharding import check_whole
from ..structure.transaction import keep, transaction
from ..structure.usable import check_base_alone, check_usable
from .adapter_hardness import save_hardness_with_adapters
from .fold_plan import plan_fold
from .fold_scales import Fold, Scale


class FoldError(ValueError):
    """λ cannot go into the weights; the message says at which sites, and why. The model is as it was."""


@dataclass
class FoldReport:
    """What `fold` did. Printing it gives the table.

    Attributes:
        sites: site → the λ that went into the weights.
        scaled, divided: site → parameters × λ and ÷ λ.
        attributes: config path → the stock activation that it names now.
        difference: max |after − before| over the outputs on the inputs, relative to the largest of them.
    """

    sites: dict[str, float]
    scaled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} activations folded; outputs changed by {self.difference:.1e} (relative)"]
        for name, value in self.sites.items():
            taken = ", ".join(self.divided[name]) or "nothing: a normalisation follows"
            lines.append(f"  {name}: λ = {value:.6g} into {', '.join(self.scaled[name])}; 1/λ into {taken}")
        lines += [f"  config.{path}: {key}" for path, key in self.attributes.items()]
        return "\n".join(lines)


@transaction
def fold(model: nn.Module, inputs: Any = None, *, only: Collection[str] | None = None) -> FoldReport:
    """Put λ into the weights, in place: a(λx)/λ becomes a(x), the stock activation, and the function stays. [derived]

    The weights before and after each activation are found by following autograd's graph through one forward pass; what it
    does not show (a use of the pre-activation elsewhere) shows in the outputs, which are compared before this returns. The
    saved checkpoint is an ordinary one: stock transformers loads it, and its activations are as hard as they were.

    Args:
        model: a converted model on real devices, in any dtype, transformers' or any other.
        inputs: arguments of forward: a mapping, a tensor, or a tuple of tensors. By default a small batch made to fit a
            transformers model.
        only: fold these sites alone; the others keep their λ, and configs what they say.

    Returns:
        What was scaled, and by how much the outputs changed: rounding, as λW is rounded; less if λ is a power of two.

    Raises:
        ValueError: no λ-GELU in the model, the model is on the meta device or offloaded, or no inputs can be made for it.
        FoldError: called in torch.inference_mode, adapters in its layers, outputs that are NaN, at some site λ has nowhere
            to go, or the outputs would change by more than 1e-5 of their largest.

    In every case the model is as it was.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> _ = hlg.convert(model, init_hardness=8.0)
        >>> hlg.fold(model, torch.randn(2, 4)).sites
        {'1': 8.0}
    """
    sites = _foldable_sites(model, only)
    inputs = _inputs(model) if inputs is None else inputs
    with evaluating(model), eager_experts(model):
        report = _fold_weights(model, sites, forward(model, inputs))
    replace_everywhere(model, sites.values(), lambda site: site.replaced or ACT2FN[_stock_keys(site.base, site)[0]])
    for prefix, part in transformers_parts(model).items() if only is None else ():  # else sites remain that configs tell of
        for path, key in list(activation_attributes(part.config)):
            if key in LAMBDA_KEYS:
                report.attributes[joined(prefix, path)] = _to_stock(model, part, path, key, sites.values())
    save_hardness_with_adapters(model)
    return report


def _foldable_sites(model: nn.Module, only: Collection[str] | None) -> dict[str, LambdaGELU]:
    """The sites that are to be folded; an error if there are none, or the weights cannot be scaled."""
    check_usable(model, FoldError)
    try:
        check_whole(model, "fold", "load what was saved into a model in one process and fold that")
    except ValueError as error:
        raise FoldError(str(error)) from None
    sites = hardness_sites(model)
    if only is not None:
        unknown = sorted(set(only) - set(sites))
        if unknown:
            raise ValueError(f"no λ-GELU called {unknown[0]!r}: the model has {', '.join(sites) or 'none'}")
        sites = {name: site for name, site in sites.items() if name in only}
    if not sites:
        raise ValueError(f"{type(model).__name__} has no λ-GELU to fold: call convert(model) first")
    check_base_alone(model, "fold", FoldError)
    check_not_offloaded(model)
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("the model is on the meta device, where weights have no values: load them first")
    quantised = quantised_weight(model)
    if quantised is not None:
        raise FoldError(f"{quantised} is quantised, so λ cannot go into it: fold the model first, then quantise it")
    return sites


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"no inputs can be guessed for {type(model).__name__}: pass inputs=…, what its forward takes")
    return example_inputs(model)


def _fold_weights(model: nn.Module, sites: Mapping[str, LambdaGELU], run: Callable[[], Any]) -> FoldReport:
    """Scale the weights around the sites; FoldError, with all of them as they were, if the outputs would change."""
    with torch.no_grad():
        expected = float_outputs(run())
    if any(bool(torch.isnan(output).any()) for output in expected):
        raise FoldError(
            "before the fold the outputs are NaN already, so nothing can be proven: pass inputs=… that give numbers"
        )
    folds = plan_fold(model, sites, run)
    _refuse(folds)
    report = FoldReport({name: float(site.hardness.detach()) for name, site in sites.items()})
    originals: dict[nn.Parameter, Tensor] = {}
    try:
        _scale(folds.values(), report, originals)
        with _stock(sites), torch.no_grad():
            report.difference = difference(expected, float_outputs(run()))
    except BaseException:
        _restore(originals)
        raise
    if not report.difference <= tolerance(expected):
        _restore(originals)
        raise FoldError(_culprits(sites, folds, run, expected, report.difference))
    for name, made in folds.items():
        report.scaled[name] = tuple(dict.fromkeys(s.label for s in made.scaled))
        report.divided[name] = tuple(dict.fromkeys(s.label for s in made.divided))
    return report


def forward(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """The model's forward on `inputs`, a mapping, a tensor or a tuple; with the same random numbers each time."""

    def run() -> Any:
        torch.clear_autocast_cache()  # weights have changed since
        with same_random_numbers(model):
            if isinstance(inputs, Mapping):
                return call(model, inputs)
            return model(*(inputs if isinstance(inputs, tuple) else (inputs,)))

    return run


def _refuse(folds: Mapping[str, Fold]) -> None:
    stuck = {name: made.obstacle for name, made in folds.items() if made.obstacle}
    if stuck:
        lines = "; ".join(f"{name}: {reason}" for name, reason in list(stuck.items())[:5])
        raise FoldError(f"λ of {len(stuck)} of {len(folds)} sites has nowhere to go: {lines}")


@torch.no_grad()
def _scale(folds: Collection[Fold], report: FoldReport, originals: dict[nn.Parameter, Tensor]) -> None:
    """Scale the weights, each once however many sites share it; `originals` gets what they were."""
    done: set[tuple[Any, ...]] = set()

    def apply(scale: Scale, factor: float) -> None:
        key = (scale.key, factor > 1)
        if key in done:
            return
        done.add(key)
        if scale.parameter not in originals:
            originals[scale.parameter] = scale.parameter.data.clone()
            keep(scale.parameter, originals[scale.parameter])
        scale.apply(factor)

    for made in folds:
        value = report.sites[made.site]
        for scale in made.scaled:
            apply(scale, value)
        for scale in made.divided:
            apply(scale, 1.0 / value)


def _restore(originals: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, original in originals.items():
        parameter.data.copy_(original)


@contextmanager
def _stock(sites: Mapping[str, LambdaGELU]) -> Iterator[None]:
    """Within the block, the sites compute their stock activation."""

    def stock(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        assert isinstance(module, LambdaGELU)
        return BASES[module.base].activation(args[0])

    with Hooks() as hooks:
        for site in sites.values():
            hooks.after(site, stock)
        yield


def _culprits(
    sites: Mapping[str, LambdaGELU],
    folds: Mapping[str, Fold],
    run: Callable[[], Any],
    expected: list[Tensor],
    total: float,
) -> str:
    """Fold each site alone to say which ones change the outputs."""
    wrong = []
    for name, site in progress(sites.items(), "Looking for what changes the outputs"):
        report = FoldReport({name: float(site.hardness.detach())})
        originals: dict[nn.Parameter, Tensor] = {}
        try:
            _scale([folds[name]], report, originals)
            with _stock({name: site}), torch.no_grad():
                if not difference(expected, float_outputs(run())) <= tolerance(expected):
                    wrong.append(name)
        finally:
            _restore(originals)
    where = ", ".join(wrong[:5]) if wrong else "all sites together"
    return (
        f"with λ in the weights the outputs would change by {total:.2g} (relative), because of {where}: the pre-activation "
        "or the activation is used elsewhere too, or weights are too large for the dtype"
    )


def _stock_keys(base: str, *sites: LambdaGELU) -> list[str]:
    """transformers' names of a base, first those that the sites had."""
    had = [site.stock_key for site in sites if site.stock_key and site.base == base]
    return had + [key for key, of in STOCK_KEYS.items() if of == base]


def _to_stock(model: nn.Module, part: PreTrainedModel, path: str, key: str, sites: Collection[LambdaGELU]) -> str:
    """Let the config name the stock activation again, which is returned."""
    stock = set_activation(part, path, *_stock_keys(LAMBDA_KEYS[key], *sites), within=model)
    if stock is None:
        raise FoldError(f"config.{path} takes no stock activation")  # `convert` has seen one there
    return stock
