"""What the calibration set says of one site: sums over the rows that the maps after it get, with what they should add."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...measurement.batches import CalibrationError
from ...structure.linear_maps import LinearMap
from .held_out import Examples, split
from .meeting_point import Meeting, Observed
from .ridge import Moments


@dataclass
class Evidence:
    """Sums of one site, over the calls of its block.

    Attributes:
        site: its name.
        maps: the linear maps that take up its output, several for experts.
        meeting: where the map's output has become part of the residual stream; None if the target is the smooth gate's
            output.
        sums: label of the map → moments of the rows to fit on, and of those to judge by.
        norm: Σ‖smooth output‖² over the rows to judge by, of all maps.
    """

    site: str
    maps: list[LinearMap]
    meeting: Meeting | None
    sums: dict[str, tuple[Moments, Moments]] = field(init=False)
    norm: float = 0.0

    def __post_init__(self) -> None:
        self.sums = {linear.label: (_empty(linear), _empty(linear)) for linear in self.maps}

    @property
    def scale(self) -> Tensor | None:
        """(k,), by what the map's output is scaled on its way into the residual stream."""
        return None if self.meeting is None else self.meeting.scale

    def add(self, substituted: Observed, wanted: Observed, examples: Examples) -> None:
        """Add the rows of one call: what the substituted network computed, and what is wanted in its place."""
        for linear in self.maps:
            if linear.label in substituted.inputs:  # else an expert to which nothing was routed
                self._add(linear, substituted, wanted, examples)

    def _add(self, linear: LinearMap, substituted: Observed, wanted: Observed, examples: Examples) -> None:
        features, output, scale = substituted.inputs[linear.label], wanted.outputs[linear.label], self.scale
        if scale is None:
            change = output - substituted.outputs[linear.label]
        else:
            change = torch.where(scale.abs() > 1e-12, (self._stream(wanted) - self._stream(substituted)) / scale, 0.0)
        fit, held_out = split(*_places(linear, substituted, examples.size), examples)
        for part, moments in zip((fit, held_out), self.sums[linear.label], strict=True):
            moments.add(features[part], change[part])
        judged = output[held_out].double()
        self.norm += float((judged if scale is None else judged * scale).square().sum())

    def _stream(self, observed: Observed) -> Tensor:
        if observed.stream is None:
            raise CalibrationError(
                f"{self.site}: a calibration batch does not reach the point where the first one's output joined the "
                "residual stream. Let every batch hold the same inputs"
            )
        return observed.stream

    def check_finite(self) -> None:
        """CalibrationError unless all sums are finite."""
        if not all(bool(torch.isfinite(s.ee.sum() + s.rr.sum())) for pair in self.sums.values() for s in pair):
            raise CalibrationError(
                f"{self.site}: what it puts out on the calibration batches, or the stream that it is added to, is not "
                "finite. Does the model overflow in half precision?"
            )


def _places(linear: LinearMap, observed: Observed, size: int) -> tuple[Tensor, int]:
    """Each row's place in a batch of `size` examples, counted example after example, and how many places there are."""
    features, leading = observed.inputs[linear.label], observed.leading[linear.label]
    if linear.index is not None and observed.routing is not None:
        return torch.where((observed.routing == linear.index).T)[1], len(observed.routing)
    rows = torch.arange(len(features), device=features.device)
    if len(leading) > 1 and leading[0] != size == leading[1]:  # positions first, as XLNet has them
        rows = rows.view(size, leading[0], -1).transpose(0, 1).reshape(-1)
    return rows, len(features)


def _empty(linear: LinearMap) -> Moments:
    return Moments.empty(*linear.shape, linear.parameter.device)
