"""Which example each row of a tensor belongs to, and whether it is a token or padding, from where the tensor was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .towers import Leading, Note, Tower


@dataclass(frozen=True)
class Places:
    """The rows of one call, in order, of the tensor flattened to (rows, features).

    Attributes:
        count: how many rows there are.
        example: (rows,), the example of the batch that each belongs to; None where that cannot be told.
        token: (rows,), True at tokens; None where all are.
        told: whether padding can be told from tokens; where it cannot, all rows count as tokens.
        row, of: (rows,), where each is among so many, for rows that are a choice of them; None where all are here.
    """

    count: int
    example: Tensor | None
    token: Tensor | None = None
    told: bool = True
    row: Tensor | None = None
    of: int | None = None

    @property
    def total(self) -> int:
        """How many rows there are with those that are not here."""
        return self.count if self.of is None else self.of


@dataclass(frozen=True)
class Chunk:
    """A call on the positions from `start` on, of `total`: chunked feed-forward calls a module several times."""

    start: int
    total: int


def chunks(notes: Sequence[Note]) -> list[Chunk | None]:
    """Which of the calls of one module in one forward pass are pieces of one sequence; None for a call on all of it.

    Calls are pieces where, within one call of a module around them, their lengths add up to its sequence.
    """
    found: list[Chunk | None] = [None] * len(notes)
    scopes = {scope.number: scope for note in notes for scope in note.scopes}  # inner ones first, call by call
    for number, scope in scopes.items():
        inside = [i for i, note in enumerate(notes) if any(s.number == number for s in note.scopes)]
        if len(inside) < 2 or any(found[i] is not None for i in inside) or not _pieces(notes, inside, scope.leading):
            continue
        start = 0
        for i in inside:
            found[i] = Chunk(start, scope.leading[1] if scope.leading else 0)
            start += notes[i].leading[1]
    return found


def _pieces(notes: Sequence[Note], inside: Sequence[int], whole: Leading | None) -> bool:
    leadings = [notes[i].leading for i in inside]
    if whole is None or len(whole) < 2 or any(len(leading) < 2 for leading in leadings):
        return False
    same = all(leading[0] == whole[0] and leading[2:] == whole[2:] for leading in leadings)
    return same and sum(leading[1] for leading in leadings) == whole[1]


def places(note: Note, chunk: Chunk | None = None, positions_first: bool = False) -> Places:
    """The places of the rows of a tensor.

    Args:
        note: where it was seen.
        chunk: which piece of the sequence it is; None for all of it.
        positions_first: whether its first dimension is the positions and its second the examples, as in XLNet.
    """
    if chunk is not None:
        first, length, *rest = note.leading
        whole = places(replace(note, leading=(first, chunk.total, *rest)), None, positions_first)
        rows = torch.arange(whole.count, device="cpu").view(first, chunk.total, -1)
        return _choice(rows[:, chunk.start : chunk.start + length].reshape(-1), whole)
    count = math.prod(note.leading)
    if note.chosen is not None:
        rows, total = note.chosen
        return _choice(rows, places(replace(note, leading=(total,), chosen=None)))
    example = _examples(note.leading, note.tower.size, positions_first)
    if not note.tower.padded:
        return Places(count, example)
    if note.tower.mixed:
        return Places(count, example, told=False)
    for mask in _masks(note.tower, note.leading):
        token = _laid_out(mask, note.leading, positions_first)
        if token is not None:
            return Places(count, example, token)
    whole_mask = _masks(note.tower, ())[0]
    if count == int(whole_mask.sum()):  # the model unpadded its input itself
        return Places(count, whole_mask.nonzero()[:, 0] // (len(whole_mask) // note.tower.size))
    return Places(count, example, told=False)


def routed(chosen: Tensor, seen: Places) -> Places:
    """The places of the rows that one expert gets.

    Args:
        chosen: (tokens, choices), True where a token's choice is this expert; rows come in the order of the choices.
        seen: the places of all tokens.
    """
    return _choice(torch.where(chosen.T)[1].cpu(), seen)


def _choice(rows: Tensor, seen: Places) -> Places:
    example, token = (None if t is None else t.cpu()[rows] for t in (seen.example, seen.token))
    return Places(len(rows), example, token, seen.told, rows, seen.count)


def _masks(tower: Tower, leading: Leading) -> list[Tensor]:
    assert tower.mask is not None
    frames = None if tower.frames is None or len(leading) < 2 else tower.frames(leading[1])
    return [tower.mask, *([] if frames is None else [frames])]


def _laid_out(mask: Tensor, leading: Leading, positions_first: bool) -> Tensor | None:
    """The mask (examples, positions) by row of a tensor of that leading shape; None if it does not fit."""
    if len(leading) == 1:
        return mask.reshape(-1) if leading[0] == mask.numel() else None
    if leading[1] == 1 != mask.shape[1] and len(leading) > 2:  # a text as an image of height one
        leading = (leading[0], *leading[2:])
    if not positions_first and leading[:2] == tuple(mask.shape):
        laid_out = mask
    elif leading[1::-1] == tuple(mask.shape):
        laid_out = mask.T
    else:
        return None
    rest = math.prod(leading[2:])  # heads, for one
    return laid_out.reshape(-1, 1).expand(-1, rest).reshape(-1)


def _examples(leading: Leading, size: int, positions_first: bool) -> Tensor | None:
    count = math.prod(leading)
    if positions_first:
        examples = torch.arange(leading[1], device="cpu")
        return examples.repeat_interleave(count // max(1, leading[0] * leading[1])).repeat(leading[0])
    return torch.arange(count, device="cpu") // (count // size) if count and count % size == 0 else None
