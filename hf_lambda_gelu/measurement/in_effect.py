"""Whether the sites of a model are what runs: a run without hooks decides, since fused kernels stand back where hooks are.

A λ-GELU counts its own calls for the time of a run. A site that was not called may be bypassed, or the batch did not reach
it (experts to which nothing is routed, the tower of text when there are images alone): a second run, with hooks, tells these
apart.
All of it is derived.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from ..activation.module import hardness_sites
from ..structure.forwards import foreign_forwards, holders, reason, refusal
from ..structure.hooks import Hooks
from .batches import CalibrationError


@contextlib.contextmanager
def counting_calls(model: nn.Module, called: set[str]) -> Iterator[None]:
    """Within the block, no hook counts: each λ-GELU does. Afterwards `called` holds those too that were called in it."""
    sites = hardness_sites(model)
    before = {name: site.calls for name, site in sites.items()}
    counts: dict[str, list[None]] = {name: [] for name in sites}
    try:
        for name, site in sites.items():
            site.calls = counts[name]
        yield
    finally:
        for name, site in sites.items():
            site.calls = before[name]
        called.update(name for name, count in counts.items() if count)


def bypassed(model: nn.Module, called: Collection[str], run: Callable[[], Any]) -> dict[str, str | None]:
    """{site: reason} of the sites that a run without hooks did not call; None where it just did not come to them.

    Args:
        called: the sites that it called.
        run: runs the model again, once, on a batch of that run. It is not run if all were called.
    """
    missed = [name for name in hardness_sites(model) if name not in called]
    if not missed:
        return {}
    ran: set[str] = set()
    with Hooks() as hooks:
        for name in {name for site in missed for name in (site, *(block for block, _ in holders(model, site)))}:
            hooks.before(model.get_submodule(name), lambda module, args, kwargs, name=name: ran.add(name))  # type: ignore[misc]
        run()
    return {site: _reason(model, site, called, ran) for site in missed}


def check_in_effect(model: nn.Module, called: Collection[str], run: Callable[[], Any]) -> list[str]:
    """The sites that the batches did not reach; CalibrationError if any is bypassed. Arguments as for `bypassed`."""
    missed = bypassed(model, called, run)
    reasons = {site: why for site, why in missed.items() if why is not None}
    if reasons:
        raise CalibrationError(refusal(reasons))
    return list(missed)


def _reason(model: nn.Module, site: str, called: Collection[str], ran: Collection[str]) -> str | None:
    """Why the site is bypassed; None if the batch did not reach it."""
    if site in ran:
        block = next((name for name, _ in holders(model, site)), "")
        kind = type(model.get_submodule(block)).__name__
        return (
            f"it runs only while hooks are on the model. Else {block or 'the model'} ({kind}) takes another path, such as a "
            "fused kernel, which never calls it: switch that path off"
        )
    foreign = {f.block: f for f in foreign_forwards(model, site)}
    for index, (block, _) in enumerate(holders(model, site)):
        if block in ran:  # the innermost that ran: it did not call what is in it
            within = f"{block}." if block else ""
            others = index > 0 and any(name.startswith(within) for name in called)  # other experts of the same block
            return reason(foreign[block]) if block in foreign and not others else None
    return None
