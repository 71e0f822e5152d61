"""A feed-forward block of a ReLU network: the maps around a ReLU, and where its units are in their parameters. [derived]

A block is h = max(0, W₁x + b₁), perhaps times W₃x + b₃, and the map W₂ that takes up h. One map may make W₁x + b₁ and
W₃x + b₃ as the halves of what it puts out, and maps may be 1×1 convolutions. See `feed_forward_search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from .fused_maps import Halves
from .linear_maps import LinearMap


class Side(NamedTuple):
    """A parameter with units in it: which of its dimensions they are, and how often each unit is there."""

    parameter: nn.Parameter
    dim: int
    times: int = 1

    def shape(self, units: int) -> tuple[int, ...]:
        """What the parameter has with so many units."""
        return tuple(self.times * units if d == self.dim else n for d, n in enumerate(self.parameter.shape))


@dataclass(frozen=True)
class FeedForward:
    """One block.

    Attributes:
        site: name of its ReLU.
        after: the map that takes up its units, W₂.
        gate: the map before the ReLU, W₁.
        up: the map that is multiplied in, W₃; None in a block without gating, or where `gate` makes it too.
        up_last: whether `up` runs after the ReLU.
        halves: which outputs of `gate` are the gate's, and which W₃'s; None where all are the gate's.
    """

    site: str
    after: LinearMap
    gate: LinearMap
    up: LinearMap | None = None
    up_last: bool = False
    halves: Halves | None = None

    @property
    def units(self) -> int:
        """How many it has now."""
        return self.after.shape[0]

    @property
    def before(self) -> tuple[LinearMap, ...]:
        """The maps that make its units."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @property
    def parameters(self) -> list[Side]:
        """Each parameter with units in it."""
        found, times = [Side(self.after.parameter, 0 if self.after.transposed else 1)], 1 if self.halves is None else 2
        for made in self.before:
            found.append(Side(made.parameter, 1 if made.transposed else 0, times))
            if made.bias is not None:
                found.append(Side(made.bias, 0, times))
        return found

    @property
    def attributes(self) -> Sequence[tuple[str, tuple[str, ...], int]]:
        """(module, attributes, times): what linear modules say of their widths, and how often it has each unit."""
        found = [(self.after.name.rpartition(".")[0], ("in_features", "in_channels", "nx"), 1)]
        times = 1 if self.halves is None else 2
        return found + [(m.name.rpartition(".")[0], ("out_features", "out_channels", "nf"), times) for m in self.before]

    def of_units(self, side: Side, units: Tensor) -> Tensor:
        """What a parameter has for these units alone, or again and again."""
        at = units if self.halves is None or side.times == 1 else self.halves.outputs_of(units, self.units)
        data = side.parameter.detach()
        return data.index_select(side.dim, at.to(data.device)).contiguous()

    def made(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """z = W₁x + b₁ and u = W₃x + b₃, (…, units) each, u None without gating, out of what `before` put out."""
        if self.halves is not None:
            return self.halves.parts(outputs[0])
        return outputs[0], outputs[1] if self.up is not None else None


@dataclass
class Blocks:
    """What one forward pass showed.

    Attributes:
        found: site → its block.
        obstacles: site → why it has none that can be told.
        shown: the sites of blocks before whose ReLU something is that the model puts out as well.
    """

    found: dict[str, FeedForward] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
