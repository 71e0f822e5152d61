"""What enters every activation over a forward pass, call by call, without the rows of padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.hooks import Hooks
from ..structure.tracing import with_more
from .batches import FORWARD_ERRORS, CalibrationError, batch_size
from .forward import call, evaluating, random_state_kept
from .places import Places, chunks, places
from .towers import Note, Towers


@dataclass
class Count:
    """What was seen of one site.

    Attributes:
        tokens, padding: rows (tokens, patches) that counted, and rows of padding that did not.
        told: whether padding could be told from tokens throughout.
    """

    tokens: int = 0
    padding: int = 0
    told: bool = True

    def add(self, seen: Places) -> None:
        tokens = seen.count if seen.token is None else int(seen.token.sum())
        self.tokens += tokens
        self.padding += seen.count - tokens
        self.told = self.told and seen.told

    def join(self, other: Count) -> None:
        """Take in what another process has seen."""
        self.tokens, self.padding = self.tokens + other.tokens, self.padding + other.padding
        self.told = self.told and other.told


@dataclass
class SiteRows:
    """Hands on what enters each site, (tokens, features) or more pieces of it, and counts tokens and padding.

    A call on part of a sequence waits until the forward pass is over, since only then is known which part it was. Where
    gradients are on, what is handed on has them.

    Attributes:
        sites: the activations by name, λ-GELUs or others.
        take: called with a site's name, the rows that are tokens, and the places of those and the others.
        features: which dimension of what enters a site its features are; the last one, where it is not given.
        later: whether all is handed on after the pass, so that within it nothing is computed: gradient checkpointing, which
            runs parts of it again, finds the same operations then.
        counts: by site.
    """

    model: nn.Module
    sites: Mapping[str, nn.Module]
    take: Callable[[str, Tensor, Places], None]
    features: Callable[[Tensor], int] | None = None
    later: bool = False
    counts: dict[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.towers = Towers(self.model, self.sites.values())
        self.counts = {name: Count() for name in self.sites}
        self._turned: dict[str, bool] = {}  # site → whether positions come before examples, where sizes do not say it
        self._waiting: dict[str, list[tuple[Tensor, Note]]] = {}

    @contextmanager
    def counting(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, the model runs once, on the batch."""
        size = batch_size(self.model, batch)
        self._waiting = {}
        try:
            with Hooks() as hooks, self.towers.following(size, batch):
                for name, site in self.sites.items():
                    hooks.before(site, partial(self._on_site, name))
                yield
            self._hand_on_waiting(batch, size)
        finally:
            self._waiting = {}

    def _hand_on_waiting(self, batch: Mapping[str, Any], size: int) -> None:
        doubtful = [n for n, seen in self._waiting.items() if n not in self._turned and any(_doubtful(s[1]) for s in seen)]
        if doubtful:
            square: dict[nn.Module, Sequence[int]] = {self.sites[name]: (size, size) for name in doubtful}
            first = positions_first(self.model, square, batch, size)
            self._turned.update({name: self.sites[name] in first for name in doubtful})
        for name, seen in self._waiting.items():
            for (x, note), chunk in zip(seen, chunks([note for _, note in seen]), strict=True):
                self._hand_on(name, x, places(note, chunk, self._turned.get(name, False)))

    def _on_site(self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if self.features is None else args[0].movedim(self.features(args[0]), -1)
        note = self.towers.note(x)
        found = places(note)
        if not found.told and (x.dim() == 3 or (x.dim() == 4 and x.shape[2] == 1)):  # a convolution's channels
            turned = self.towers.note(moved := x.movedim(1, -1))
            if places(turned).told:
                x, note, found = moved, turned, places(turned)
        if not self.later and found.told and not _doubtful(note):
            self._hand_on(name, x, found)
        else:
            self._waiting.setdefault(name, []).append((x, note))

    def _hand_on(self, name: str, x: Tensor, seen: Places) -> None:
        self.counts[name].add(seen)
        flat = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
        self.take(name, flat if seen.token is None else flat[seen.token.to(flat.device)], seen)


def _doubtful(note: Note) -> bool:
    """Whether it matters which dimension is the examples, and the sizes alone do not say it."""
    square = len(note.leading) > 1 and note.leading[0] == note.leading[1] == note.tower.size > 1
    return square and note.tower.padded


@torch.no_grad()
def positions_first(
    model: nn.Module, modules: Mapping[nn.Module, Sequence[int]], batch: Mapping[str, Any], size: int
) -> Collection[nn.Module]:
    """Which of the modules work on (positions, examples, …), found by a run on one example less.

    Args:
        modules: with the leading shape of what enters each on the batch, all calls together, whose second number is the
            number of examples.

    Raises:
        CalibrationError: the batch cannot be cut to one example less, so that it cannot be told.
    """
    less = {k: v[: size - 1] if isinstance(v, Tensor) and v.dim() and len(v) == size else v for k, v in batch.items()}
    seen: dict[nn.Module, Sequence[int]] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen[module] = with_more(seen.get(module), args[0].shape[:-1])

    with evaluating(model, in_run=True), random_state_kept(model), Hooks() as hooks:  # as the caller runs it
        for module in modules:
            hooks.before(module, watch)
        try:
            call(model, less)
        except FORWARD_ERRORS as error:
            raise CalibrationError(
                f"a calibration batch has as many positions as examples ({size}), and {type(model).__name__} does not run "
                f"on one less ({type(error).__name__}: {error}), so that padding cannot be told. Use another batch size"
            ) from error
    return [m for m, leading in seen.items() if len(leading) > 1 and tuple(leading[:2]) == (modules[m][0], size - 1)]
