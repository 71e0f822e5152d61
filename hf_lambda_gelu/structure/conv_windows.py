"""What a convolution gets at each position that it puts out: the rows by which it is a linear map (im2col).

At position p a convolution computes y(p) = W x(p) + b, where x(p) (d · ∏ kernel) holds the channels of its group at the
positions that the kernel covers, zeros where it reaches beyond the edge; W is its weight, each output's elements in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Window:
    """How a convolution goes over its positions, one number for each of their dimensions.

    Attributes:
        kernel, stride, dilation: as torch has them.
        padding: (before, after), zeros at both ends.
        groups: parts of the channels that do not meet.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int = 1

    @classmethod
    def of(cls, kernel: Sequence[int], given: dict[str, Any]) -> Window:
        """From the arguments of `F.conv1d` and its like."""
        kernel, n = tuple(kernel), len(kernel)
        stride, dilation = (_each(given.get(name, 1), n) for name in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if padding == "same":
            beyond = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            ends = tuple((total // 2, total - total // 2) for total in beyond)
        else:
            ends = tuple((p, p) for p in _each(0 if padding == "valid" else padding, n))
        return cls(kernel, stride, dilation, ends, int(given.get("groups", 1)))

    @property
    def pointwise(self) -> bool:
        """Whether each position is put out from itself alone, and all channels meet."""
        still = set(self.kernel) == {1} == set(self.stride) and {0} == {p for ends in self.padding for p in ends}
        return still and self.groups == 1

    def rows(self, input: Tensor, group: int = 0) -> Tensor:
        """(rows, d / groups · ∏ kernel): of a channels last (…, d) input, in the order of the positions that are put out."""
        n = len(self.kernel)
        x = input.movedim(-1, -n - 1)
        width = x.shape[-n - 1] // self.groups
        x = x.narrow(-n - 1, group * width, width)
        if any(p for ends in self.padding for p in ends):
            x = F.pad(x, [p for ends in reversed(self.padding) for p in ends])
        for size, step, apart in zip(self.kernel, self.stride, self.dilation, strict=True):
            x = x.unfold(-n, (size - 1) * apart + 1, step)[
                ..., ::apart
            ]  # the kernel's dimension comes last, so −n is the next
        # (…, d, *positions, *kernel)
        x = x.movedim(-2 * n - 1, -n - 1)
        return x.reshape(-1, width * math.prod(self.kernel))


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values
