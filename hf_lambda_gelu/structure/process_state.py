"""What of a process a verb may touch, and how to put it back: torch's modes, random numbers, transformers' tables."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2CLS, ACT2FN
from transformers.utils import logging

from .._compat import compile_stance, mode_stack, put_compile_stance, put_mode_stack


def process_state(devices: Iterable[torch.device]) -> list[Callable[[], object]]:
    """Calls that put the process's state back to what it is now, in the order in which they must be made.

    Args:
        devices: accelerators whose random numbers are part of the state. The CPU's always are.
    """
    accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
    return [
        partial(put_mode_stack, mode_stack()),  # first: a mode that is left over would see all that follows
        partial(put_compile_stance, compile_stance()),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        partial(torch.set_default_dtype, torch.get_default_dtype()),
        *(_autocast(kind) for kind in sorted({"cpu", *(device.type for device in accelerators)})),
        partial(_put_autocast_nesting, _autocast_nesting()),
        *(_replaced(owner, name) for owner, name in _patched_by_transformers()),
        *(_table(table) for table in (ACT2FN, ACT2CLS)),
        partial(_put_warnings, warnings.filters, list(warnings.filters), warnings.showwarning),
        partial(logging.set_verbosity, logging.get_verbosity()),
        logging.enable_progress_bar if logging.is_progress_bar_enabled() else logging.disable_progress_bar,
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
        *(_generator(device) for device in accelerators),
    ]


def _generator(device: torch.device) -> Callable[[], object]:
    module = torch.get_device_module(device)
    return partial(module.set_rng_state, module.get_rng_state(device), device)


def _autocast(kind: str) -> Callable[[], object]:
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    cached = torch.is_autocast_cache_enabled()

    def put() -> None:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)

    return put


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _put_autocast_nesting(depth: int) -> None:
    while _autocast_nesting() > depth:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _patched_by_transformers() -> list[tuple[Any, str]]:
    """(owner, name) of what transformers exchanges in the libraries while it builds or loads a model."""
    owners = [sys.modules[name] for name in initialization.TORCH_MODULES_TO_PATCH if name in sys.modules]
    found = [(owner, name) for owner in owners for name in initialization.TORCH_INIT_FUNCTIONS if hasattr(owner, name)]
    own = [(PreTrainedModel, name) for name in ("tie_weights", "_init_weights", "init_weights", "initialize_weights")]
    return [*found, *((o, n) for o, n in own if hasattr(o, n)), (torch, "linspace")]


def _replaced(owner: Any, name: str) -> Callable[[], object]:
    before = vars(owner).get(name)

    def put() -> None:
        if before is not None and vars(owner).get(name) is not before:
            setattr(owner, name, before)

    return put


def _table(table: dict[str, Any]) -> Callable[[], object]:
    before = list(table.items())

    def put() -> None:
        if list(table.items()) != before:
            table.clear()
            table.update(before)

    return put


def _put_warnings(filters: Any, content: list[Any], show: Any) -> None:
    if warnings.filters is not filters or list(filters) != content:
        with warnings.catch_warnings():  # its end tells Python's caches that filters have changed
            pass
        warnings.filters = filters
        filters[:] = content
    warnings.showwarning = show
