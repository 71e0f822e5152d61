"""Lists the smooth activations of a model that no conversion reaches, each with the reason.

Three kinds: modules that the modelling code hard-codes; functions that modules keep as attributes (`kept_functions`); and
functional calls. `F.gelu(x)` in RoBERTa's LM head, `nn.functional.gelu` in Whisper's convolution stem, `ACT2FN[…]` looked up
inside forward in DeBERTa's pooler: none of them is a module. `modelling_code` finds them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

from torch import nn

from ..activation.module import LambdaGELU
from .config import LAMBDA_KEYS, STOCK_KEYS
from .kept_functions import kept_functions
from .modelling_code import calls_in_class
from .modules import is_activation, joined, named_modules, probed_base

# "gelu", "silu", "swish": the family's names that are no variants of another
_WORDS = [key for key in STOCK_KEYS if not any(other in key for other in STOCK_KEYS if other != key)]

_STOCK_NAMES = {
    "gelu": "torch.nn.GELU()",
    "gelu_tanh": 'torch.nn.GELU(approximate="tanh")',
    "quick_gelu": "transformers.activations.QuickGELUActivation()",
    "silu": "torch.nn.SiLU()",
}


@dataclass(frozen=True)
class Unconverted:
    """An activation of the family that stays smooth, and why."""

    name: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}: {self.reason}"


def smooth_activations(
    model: nn.Module, claimed: Collection[str] = (), attributes: Collection[str] = ()
) -> list[Unconverted]:
    """The GELUs and SiLUs of `model` outside the modules `claimed`.

    `attributes` are the config paths that were or will be rewritten: an in-forward lookup that reads one of them follows it.
    """
    left = smooth_modules(model, claimed) + smooth_functions(model)
    leaves = [path.rpartition(".")[2] for path in attributes]
    for cls, places in _classes(model).items():
        calls = calls_in_class(cls)
        name = places[0] or cls.__name__
        label = name if len(places) == 1 else f"{name} (and {len(places) - 1} more {cls.__name__})"
        for call in calls:
            reason = "a function call in the modelling code, out of reach of a module swap"
            if call.startswith(("ACT2FN[", "ACT2CLS[", "get_activation(")):
                if not _looks_up_smooth(model.get_submodule(places[0]), call):
                    continue
                reason = "looked up inside forward, a fresh activation at each call, so it cannot learn: "
                follows = any(f".{leaf}" in call for leaf in leaves)
                reason += "it turns into ReLU with relu_ize, unprepared" if follows else "it stays as its attribute says"
            left.append(Unconverted(label, call, reason))
    return left


def smooth_modules(model: nn.Module, claimed: Collection[str] = ()) -> list[Unconverted]:
    """The GELU and SiLU modules of `model` outside those `claimed`."""
    return [
        Unconverted(name, type(module).__name__, _HARD_CODED if probed_base(module) is not None else _OTHER)
        for name, module in named_modules(model)
        if name not in claimed and _is_smooth(module)
    ]


_HARD_CODED = "hard-coded: no config attribute tells a stock reload to build it otherwise; convert(hard_coded=True) and fold"
_OTHER = (
    "none of the four activations that λ takes to ReLU (GELU by erf, by tanh and by x · sigmoid(1.702 x), SiLU), or with a "
    "state of its own: it stays as it is"
)


def smooth_functions(model: nn.Module) -> list[Unconverted]:
    """The functions of the family that modules of `model` keep as attributes; a module that several names share, once.

    What an activation keeps (transformers' GELUTanh does) is the activation, and `smooth_modules` names that.
    """
    reason = "a function, which no swap of modules reaches: keep a module there, such as {stock}, and convert again"
    return [
        Unconverted(joined(name, kept.attribute), kept.what, reason.format(stock=_STOCK_NAMES[kept.base]))
        for name, module in model.named_modules()
        if not _is_smooth(module)
        for kept in kept_functions(module)
    ]


def _is_smooth(module: nn.Module) -> bool:
    # those that take more than a tensor are known by their names only
    named = any(word in type(module).__name__.lower() for word in _WORDS)
    bare = not any(True for _ in chain(module.children(), module.parameters()))
    return probed_base(module) is not None or (named and bare and not isinstance(module, LambdaGELU))


def _classes(model: nn.Module) -> dict[type, list[str]]:
    names: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if not is_activation(module):
            names.setdefault(type(module), []).append(name)
    return names


def _looks_up_smooth(module: nn.Module, call: str) -> bool:
    """Whether `ACT2FN[self.config.hidden_act]` finds a smooth activation; True if that cannot be told."""
    match = re.search(r"[\[(]self\.([\w.]+)[\])]", call)
    try:
        key = operator.attrgetter(match[1])(module) if match else None
    except AttributeError:
        key = None
    return not isinstance(key, str) or key in STOCK_KEYS or key in LAMBDA_KEYS
