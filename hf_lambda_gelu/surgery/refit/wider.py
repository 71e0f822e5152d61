"""What a refit asks of whoever makes layers wider on its way; see `surgery/hinges`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ...structure.linear_maps import LinearMap
from ...structure.tracing import Trace
from .chain_walk import ChainWalk


class Wider(Protocol):
    """Makes the layers around sites wider in the substituted network, each when its turn comes."""

    def plan(self, forward: Callable[[], Any]) -> tuple[list[LinearMap], list[LinearMap]]:
        """Find what will be wider, on a run that reaches all sites; the maps that want biases, and those that need one."""

    def check(self, traced: Trace, method: str) -> None:
        """Raise, before anything is refit, where that cannot be."""

    def shapes(self) -> dict[nn.Parameter, tuple[int, ...]]:
        """The shapes that parameters will have."""

    def around(self, site: str) -> Sequence[LinearMap]:
        """The maps of the layer around a site that will be wider; none where it stays as it is."""

    def widen(self, walk: ChainWalk, name: str, positions_first: bool) -> None:
        """Make the layer around a site wider, before the map after it is refit."""

    def note(self, sites: Sequence[str]) -> dict[str, Any]:
        """What was done at these sites, as JSON can hold it, for `resume`."""

    def resume(self, noted: Mapping[str, Any]) -> None:
        """Take over what another process did there, and noted; the parameters have its wider data by now."""
