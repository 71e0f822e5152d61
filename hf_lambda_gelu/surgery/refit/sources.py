"""Where the weights of a block go to while a refit runs over a model of which one block at a time is whole in memory.

What is refit rests from the time on when the walk leaves its block: in files (`refit_files`), or as this process's part of
it (`refit_shards`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...structure.block_source import BlockSource
from .report import CompensatedSite
from .runs import ReplayError
from .store import Store


class RefitWeights:
    """The refit weights of a model whose weights come and go with its blocks.

    Attributes:
        source: brings the weights.
    """

    def __init__(self, source: BlockSource) -> None:
        self.source: BlockSource = source

    @contextmanager
    def holding(self, parameters: Iterable[nn.Parameter], originals: dict[nn.Parameter, Tensor]) -> Iterator[None]:
        """Within the block, both networks' weights are on the device; afterwards all rest, what was refit too."""
        parameters = list(dict.fromkeys(parameters))
        before = {p: originals[p] for p in parameters if p in originals}
        with self.source.holding(parameters) as held:
            away = {p: data for p, data in before.items() if self.source.rests(data)}
            originals.update(zip(away, self.source.load_all(list(away.values())), strict=True))
            try:
                yield
                self._let_rest(parameters, held | before, originals)
            except ReplayError:  # some of its sites are refit all the same
                self._let_rest(parameters, held | before, originals)
                raise
            finally:
                for parameter, resting in before.items():
                    if parameter in originals:
                        originals[parameter] = resting

    def _let_rest(
        self,
        parameters: Iterable[nn.Parameter],
        smooth: Mapping[nn.Parameter, Tensor],
        originals: dict[nn.Parameter, Tensor],
    ) -> None:
        for parameter in parameters:
            if parameter in originals and not self.source.rests(parameter.data):
                self._put_away(parameter)
                if self.source.streams(parameter):  # what lies outside of blocks, and a new bias, stays on the device
                    originals[parameter] = smooth.get(parameter, originals[parameter])

    @abstractmethod
    def _put_away(self, parameter: nn.Parameter) -> None:
        """Let a refit weight rest if it comes and goes with a block; keep what others must not lose."""

    # ------------------------------------------------------------------------- what a killed process leaves the next

    def read_journal(self) -> None:
        """Take over what an earlier process has done."""

    def expect(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> None:
        """To be called before the first block: the weights that will be changed, and the shapes that they will have."""

    def earlier(
        self, sites: Sequence[str], originals: dict[nn.Parameter, Tensor]
    ) -> tuple[list[CompensatedSite], Mapping[str, Any]] | None:
        """What an earlier process did in the block with these sites, whose weights are then refit; None if nothing.

        Its reports, and what was noted of layers that are wider.
        """
        return None

    def take_states(self, sites: Sequence[str], store: Store) -> None:
        """Let the store have what an earlier process kept of the states after the block with these sites."""

    def note(
        self,
        sites: Sequence[str],
        made: Sequence[CompensatedSite],
        store: Store,
        states: Sequence[str],
        wider: Mapping[str, Any],
    ) -> None:
        """Take note that a block is done: its reports, and the names of its states in the store that no run finds again."""

    # ----------------------------------------------------------------------------------------------------- at the end

    def commit(self, originals: Mapping[nn.Parameter, Tensor]) -> set[nn.Parameter]:
        """Put refit weights where they are to stay; those that are in memory, and still to be put there, are returned."""
        return set()
