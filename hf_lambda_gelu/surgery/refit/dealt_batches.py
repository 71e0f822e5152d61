"""The calibration set of a refit on disk: this process's share of it, and what it knows of the others'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from ..._compat import pytree
from ...measurement.batches import batch_size
from ...measurement.deal import Deal, digest
from ...measurement.team import Team
from .held_out import Examples
from .store import Store

logger = logging.get_logger(__name__)


class DealtBatches:
    """The batches, of which a process of the team has its own share; there is nothing else to it where it works alone.

    Own batches have numbers from 0 to `count`; the batches of all have others, in the order in which they were dealt.

    Attributes:
        sizes: how many examples each of the own batches has.
        deal: the sizes of all.
    """

    def __init__(self, model: nn.Module, store: Store, team: Team) -> None:
        self.model, self.store, self.team = model, store, team
        self.sizes: list[int] = []
        self._places: list[int] = []  # in the loader, of each own batch
        self.deal = Deal([[]])
        self._starts: list[int] = []
        self._shown: set[int] = set()

    def keep(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Keep the share on disk: it is iterated once.

        A batch that was there before is left out: half of it would be held out to judge what the other half has fitted.
        """
        known, repeated = set[str](), 0
        for place, batch in enumerate(batches):
            key = digest(batch)
            if key in known:
                repeated += 1
                continue
            known.add(key)
            self.store.put(f"batch-{self.count}", dict(batch))
            self.sizes.append(batch_size(self.model, batch))
            self._places.append(place)
        if repeated:
            logger.warning(
                f"{repeated} of {repeated + self.count} calibration batches are the same as earlier ones and were left out: "
                "they say nothing new. Does each worker of a DataLoader give the whole of an IterableDataset?"
            )
        self.deal = Deal(self.team.gathered(self.sizes, "the sizes of all batches"))
        self._starts = self.deal.starts(self.team.rank)

    @property
    def count(self) -> int:
        """How many own batches there are."""
        return len(self.sizes)

    def get(self, index: int) -> dict[str, Any]:
        """One of the own batches."""
        batch: dict[str, Any] = self.store.get(f"batch-{index}")
        return batch

    def called(self, number: int) -> int:
        """By which number a person knows one of the batches of all: its place in the loader, where there is a single one."""
        return self._places[number] if self.team.size == 1 else number

    def examples(self, index: int) -> Examples:
        """Which examples of all those of an own batch are."""
        return Examples(self._starts[index], self.deal.examples <= 1)

    @property
    def head(self) -> range:
        """The first batch of all, on the process that has it."""
        return range(min(1, self.count) if self.team.rank == self.deal.leader else 0)

    @property
    def rest(self) -> range:
        """The own batches but for `head`."""
        return range(len(self.head), self.count)

    def shown(self, number: int) -> dict[str, Any]:
        """One of the batches of all, on every process: when it is asked for first, that is a meeting."""
        rank, place = self.deal.order[number]
        own = rank == self.team.rank
        if self.team.size > 1 and number not in self._shown:
            sent = pytree.tree_map(_on_cpu, self.get(place)) if own else None
            batch = self.team.given(rank, sent, f"batch {number}")
            self._shown.add(number)
            if not own:
                self.store.put(f"shown-{number}", batch)
        if own:
            return self.get(place)
        shown: dict[str, Any] = self.store.get(f"shown-{number}")
        return shown


def _on_cpu(leaf: Any) -> Any:
    return leaf.to("cpu") if isinstance(leaf, Tensor) else leaf
