"""Lists the smooth activations of a model that no conversion reaches, each with the reason.

Two kinds: modules that the modelling code hard-codes, and functional calls. `F.gelu(x)` in RoBERTa's LM head,
`nn.functional.gelu` in Whisper's convolution stem, `ACT2FN[…]` looked up inside forward in DeBERTa's pooler: none of them is
a module. They are found by reading the syntax tree of the classes that the model is made of.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import sys
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import chain

from torch import nn

from ..activation.module import LambdaGELU
from .config import LAMBDA_KEYS, STOCK_KEYS
from .modules import is_activation, named_modules, probed_base

_FUNCTIONS = {"gelu", "gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "silu", "swish"}


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
    left = smooth_modules(model, claimed)
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
    reason = "hard-coded: no config attribute tells a stock reload to build it otherwise; convert(hard_coded=True) and fold"
    return [
        Unconverted(name, type(module).__name__, reason)
        for name, module in named_modules(model)
        if name not in claimed and _is_smooth(module)
    ]


def _is_smooth(module: nn.Module) -> bool:
    # those that take more than a tensor are known by their names only
    named = re.search(r"gelu|silu|swish", type(module).__name__, re.IGNORECASE) is not None
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


@cache
def calls_in_class(cls: type) -> tuple[str, ...]:
    """The calls in the methods that `cls` itself or its model-code ancestors define, construction aside.

    Those in functions of the same file that these methods call count too.
    """
    calls: dict[str, None] = {}
    for owner in cls.__mro__:
        if owner is object or owner.__module__.startswith("torch.") or _is_library_plumbing(owner):
            continue
        for method in ast.walk(_tree(owner)):
            if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "_init_weights"):
                calls.update(_calls(method, owner.__module__, set()))
    return tuple(calls)


def _tree(source: object) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(source)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):  # defined interactively, or in C: nothing to read
        return ast.Module([], [])


def _calls(tree: ast.AST, module: str, seen: set[str]) -> dict[str, None]:
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if _is_activation_call(node):
            found[ast.unparse(node)] = None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in seen:
            function = inspect.unwrap(value) if callable(value := vars(sys.modules[module]).get(node.func.id)) else None
            if inspect.isfunction(function) and function.__module__ == module:
                seen.add(node.func.id)
                found.update(_calls(_tree(function), module, seen))
    return found


def _is_activation_call(node: ast.AST) -> bool:
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Mult):
        return _is_silu(node)
    if isinstance(node, ast.Subscript):
        return _leaf(node.value) in ("ACT2FN", "ACT2CLS")
    if isinstance(node, ast.Call):
        leaf = _leaf(node.func)
        # `self.gelu(x)` is a call of a module, which the module swap sees
        own = isinstance(node.func, ast.Attribute) and _root(node.func) == "self"
        return leaf == "get_activation" or (leaf in _FUNCTIONS and not own)
    return False


def _is_silu(node: ast.BinOp | ast.AugAssign) -> bool:
    """x * sigmoid(x), in either order or in place."""
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
    texts = [ast.unparse(side) for side in sides]
    for side, other in zip(sides, reversed(texts), strict=True):
        if isinstance(side, ast.Call) and _leaf(side.func) == "sigmoid":
            argument = side.args[0] if side.args else getattr(side.func, "value", None)  # sigmoid(x), or x.sigmoid()
            scaled = isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Mult)
            factors = (argument.left, argument.right) if scaled else (argument,)
            return any(factor is not None and ast.unparse(factor) == other for factor in factors)
    return False


def _leaf(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_library_plumbing(cls: type) -> bool:
    # PreTrainedModel, GenerationMixin …: thousands of lines without an activation
    return cls.__module__.startswith("transformers.") and not cls.__module__.startswith("transformers.models.")
