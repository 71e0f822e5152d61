"""What the calibration set says of one site: sums over the rows that the maps after it get, with what they should add."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...measurement.batches import CalibrationError
from ...measurement.places import chunks, places, routed
from ...measurement.site_rows import Count
from ...measurement.team import Team
from ...measurement.towers import Note
from ...structure.linear_maps import LinearMap
from .held_out import Examples, split
from .meeting_point import MapCall, Meeting, Observed, Stream
from .ridge import FEW, PIECE, Moments, Pieces
from .row_weights import RowWeights


class MeetingError(Exception):
    """What is at the meeting point are not the rows of the map on every batch. Never leaves the package."""


@dataclass
class Evidence:
    """Sums of one site, over the calls of its block.

    Attributes:
        site: its name.
        maps: the linear maps that take up its output, several for experts.
        meeting: where the map's output has become part of the residual stream; None if the target is the smooth gate's
            output.
        positions_first: whether the site works on (positions, examples, …), as in XLNet.
        sums: label of the map → moments of the rows to fit on, and of those to judge by.
        norm: Σ‖smooth output‖² over the rows to judge by, of all maps.
        seen: tokens and padding among the rows, of all maps.
        weigh: what a row counts, by the stream there; None for all alike.

    The sums and the norm are there once `finish` was called; of a team's processes, the first one has them.
    """

    site: str
    maps: list[LinearMap]
    meeting: Meeting | None
    positions_first: bool = False
    sums: dict[str, tuple[Moments, Moments]] = field(init=False)
    norm: float = 0.0
    seen: Count = field(default_factory=Count)
    weigh: RowWeights | None = None

    def __post_init__(self) -> None:
        self.sums = {linear.label: (_empty(linear), _empty(linear)) for linear in self.maps}
        rows = max(FEW, PIECE // max(1, len(self.maps)))
        self._pieces = {label: [Pieces(moments, rows) for moments in pair] for label, pair in self.sums.items()}
        self._norms: list[Tensor] = []

    @property
    def scale(self) -> Tensor | None:
        """(k,), by what the map's output is scaled on its way into the residual stream."""
        return None if self.meeting is None else self.meeting.scale

    def add(self, substituted: Observed, wanted: Observed, examples: Examples) -> None:
        """Add the rows of one run: what the substituted network computed, and what is wanted in its place.

        Raises:
            MeetingError: what is at the meeting point are not the rows of the map, or other rows are padding there, as in
                a model that finds its tokens (regions of an image) itself.
        """
        for linear in self.maps:
            given, aim = (observed.calls.get(linear.label, []) for observed in (substituted, wanted))
            if len(given) != len(aim) or not all(_alike(g.note, a.note) for g, a in zip(given, aim, strict=True)):
                raise MeetingError
            if given:  # else an expert to which nothing was routed
                change = self._change(given, aim, substituted.stream, wanted.stream)
                self._add(linear, given, aim, change, examples, self._weights(aim, wanted.stream))

    def _change(self, given: list[MapCall], aim: list[MapCall], now: Stream, wanted: Stream) -> Tensor:
        """What the map's output should change by, in the order of its calls."""
        if self.meeting is None or self.scale is None:
            return torch.cat([_wide(a.output) - _wide(g.output) for a, g in zip(aim, given, strict=True)])
        notes = [call.note for call in given]
        streams = [self.meeting.rows(stream, notes) for stream in (now, wanted)]
        if streams[0] is None or streams[1] is None or len(streams[0]) != sum(len(call.input) for call in given):
            raise MeetingError
        return torch.where(self.scale.abs() > 1e-12, (_wide(streams[1]) - _wide(streams[0])) / self.scale, 0.0)

    def _weights(self, aim: list[MapCall], wanted: Stream) -> Tensor | None:
        """What each row counts, by what the smooth network has at the meeting point, or puts out."""
        if self.weigh is None:
            return None
        rows = None if self.meeting is None else self.meeting.rows(wanted, [call.note for call in aim])
        return self.weigh.of(torch.cat([call.output for call in aim]) if rows is None else rows)

    def _add(
        self,
        linear: LinearMap,
        given: list[MapCall],
        aim: list[MapCall],
        change: Tensor,
        examples: Examples,
        weights: Tensor | None,
    ) -> None:
        start = 0
        for call, output, chunk in zip(given, aim, chunks([call.note for call in given]), strict=True):
            if linear.index is not None and call.routing is not None:
                tokens = replace(call.note, leading=(len(call.routing),))
                seen = routed(call.routing == linear.index, places(tokens))
            else:
                seen = places(call.note, chunk, self.positions_first)
            fit, held_out = split(seen, examples)
            wanted = change[start : start + len(call.input)]
            each = None if weights is None else weights[start : start + len(call.input)]
            start += len(call.input)
            device = call.input.device
            fitted, judged_by = (part.cpu().nonzero()[:, 0].to(device) for part in (fit, held_out))  # no wait for the device
            for rows, pieces in zip((fitted, judged_by), self._pieces[linear.label], strict=True):
                chosen = None if each is None else each.index_select(0, rows)
                pieces.add(call.input.index_select(0, rows), wanted.index_select(0, rows), chosen)
            judged = output.output.index_select(0, judged_by).double()
            squares = (judged if self.scale is None else judged * self.scale).square().sum(1)
            self._norms.append((squares if each is None else squares * each.index_select(0, judged_by)).sum())
            self.seen.add(seen)

    def finish(self, team: Team) -> None:
        """All runs were added, on each process of the team its own."""
        for pair in self._pieces.values():
            for pieces in pair:
                pieces.finish()
        if self._norms:
            self.norm = float(torch.stack(self._norms).sum())
        if team.size > 1:
            self._join(team)

    def _join(self, team: Team) -> None:
        every = [moments for pair in self.sums.values() for moments in pair]
        team.add_up((t for m in every for t in (m.r, m.e, m.rr, m.re, m.ee)), f"the sums of {self.site}")
        own = [(m.count, m.mass) for m in every], self.norm, self.seen
        told = team.gathered(own, f"the rows of {self.site}")
        for place, moments in enumerate(every):
            moments.count = sum(counts[place][0] for counts, *_ in told)
            moments.mass = sum(counts[place][1] for counts, *_ in told)
        self.norm, self.seen = sum(norm for _, norm, _ in told), Count()
        for *_, seen in told:
            self.seen.join(seen)

    def check_finite(self) -> None:
        """CalibrationError unless all sums are finite."""
        if not all(bool(torch.isfinite(s.ee.sum() + s.rr.sum())) for pair in self.sums.values() for s in pair):
            raise CalibrationError(
                f"{self.site}: what it puts out on the calibration batches, or the stream that it is added to, is not "
                "finite. Does the model overflow in half precision?"
            )


def _alike(one: Note, other: Note) -> bool:
    """Whether rows that were seen at two places are the same tokens."""
    masks = one.tower.mask, other.tower.mask
    if masks[0] is None or masks[1] is None:
        return one.leading == other.leading and masks[0] is masks[1]
    return one.leading == other.leading and torch.equal(masks[0], masks[1])


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 or more: a difference of half precision numbers is not one."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _empty(linear: LinearMap) -> Moments:
    return Moments.empty(*linear.shape, linear.parameter.device)
