"""What a refit asks of whoever makes layers wider on its way; see `surgery/hinges`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ...structure.linear_maps import LinearMap
from ...structure.tracing import Trace
from .chain_walk import ChainWalk


class Wider(Protocol):
    """Makes the layers around sites wider in the substituted network, each when its turn comes."""

    def plan(self, forward: Callable[[], Any]) -> list[LinearMap]:
        """Find what will be wider on a run that reaches all sites; the maps that want a bias for it."""

    def check(self, traced: Trace, method: str) -> None:
        """Raise, before anything is refit, where that cannot be."""

    def widen(self, walk: ChainWalk, name: str, positions_first: bool) -> None:
        """Make the layer around a site wider, before the map after it is refit."""
