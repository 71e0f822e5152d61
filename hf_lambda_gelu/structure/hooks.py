"""Hooks on modules for the time of a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn


class Hooks:
    """Within the block, hooks are on the modules; afterwards all of them are gone, whatever was raised.

    Examples:
        >>> with Hooks() as hooks:
        ...     hooks.after(module, lambda module, args, output: seen.append(output))
        ...     model(**batch)
    """

    def __init__(self) -> None:
        self._handles = ExitStack()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handles.close()

    def before(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """`hook(module, args, kwargs)` before each call of `module`; what it returns, if anything, are the new arguments."""
        self._handles.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        """`hook(module, args, output)` after each call of `module`; what it returns, if anything, is the new output."""
        self._handles.callback(module.register_forward_hook(hook).remove)
