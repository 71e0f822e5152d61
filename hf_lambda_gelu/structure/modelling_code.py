"""Finds the calls of smooth activations in modelling code, by reading the syntax tree of the classes of a model."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import cache
from types import FunctionType

from .config import STOCK_KEYS


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


def _tree(source: type | FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(source)))
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
        return leaf == "get_activation" or (leaf in STOCK_KEYS and not own)
    return False


def _is_silu(node: ast.BinOp | ast.AugAssign) -> bool:
    """x * sigmoid(x), in either order or in place."""
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
    texts = [ast.unparse(side) for side in sides]
    for side, other in zip(sides, reversed(texts), strict=True):
        if isinstance(side, ast.Call) and _leaf(side.func) == "sigmoid":
            argument = side.args[0] if side.args else getattr(side.func, "value", None)  # sigmoid(x), or x.sigmoid()
            factors: tuple[ast.expr | None, ...] = (argument,)
            if isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Mult):
                factors = (argument.left, argument.right)
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
