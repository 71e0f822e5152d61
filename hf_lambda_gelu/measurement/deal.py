"""How the batches of a calibration set are dealt out to the processes of a team: each passes its own share.

Their order is that of cards that are dealt: the first batch of each process, then the second of each. So with accelerate's
loaders, and with `batches[rank::size]`, all is found that one process finds on `batches`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._compat import pytree


@dataclass(frozen=True)
class Deal:
    """The sizes of all batches.

    Attributes:
        sizes: by process, how many examples each of its batches has.
    """

    sizes: Sequence[Sequence[int]]

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """(process, place among its own) of each batch, in the order in which they were dealt."""
        places = ((place, rank) for rank, own in enumerate(self.sizes) for place in range(len(own)))
        return [(rank, place) for place, rank in sorted(places)]

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return sum(map(sum, self.sizes))

    @property
    def leader(self) -> int:
        """The process that has the first batch."""
        return self.order[0][0] if self.order else 0

    def size(self, number: int) -> int:
        """How many examples that batch has."""
        rank, place = self.order[number]
        return self.sizes[rank][place]

    def number(self, rank: int, place: int) -> int:
        """Which of all batches this one is."""
        return self.order.index((rank, place))

    def starts(self, rank: int) -> list[int]:
        """The number of the first example of each of the process's batches, among all."""
        starts: dict[tuple[int, int], int] = {}
        count = 0
        for owner, place in self.order:
            starts[owner, place] = count
            count += self.sizes[owner][place]
        return [starts[rank, place] for place in range(len(self.sizes[rank]))]


def digest(batch: Any) -> str:
    """By which a batch is known again."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(dict(batch) if hasattr(batch, "keys") else batch):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().to("cpu").contiguous().reshape(-1)
            found.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            found.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def same_share(digests: Sequence[Sequence[str]]) -> tuple[int, int] | None:
    """Two processes of which the second has no batch that the first has not; None if each has some of its own."""
    for rank, own in enumerate(digests):
        for other in range(len(digests)):
            if own and other != rank and set(own) <= set(digests[other]):
                return other, rank
    return None


def repeated(loader: Any) -> int:
    """How many examples accelerate's loader, or a DistributedSampler, repeats so that all shares are of one size."""
    sampler: Any = getattr(loader, "sampler", None)
    if hasattr(sampler, "total_size") and hasattr(sampler, "num_replicas"):
        return max(0, int(sampler.total_size) - len(sampler.dataset))
    batches = getattr(loader, "batch_sampler", None)
    if not getattr(batches, "even_batches", False) or getattr(batches, "num_processes", 1) == 1:
        return 0
    if getattr(batches, "drop_last", False):
        return 0
    return -len(loader.dataset) % int(loader.total_batch_size)
