"""A linear map that makes gate and up together: which of its outputs are whose, by where in memory they lie. [derived]"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Halves:
    """Where unit j of the gate and of the up map are among the 2d outputs of one map.

    Attributes:
        gate_first: whether the gate's are before those of the up map.
        interleaved: whether they are 2j and 2j + 1, in turns; else j and d + j.
    """

    gate_first: bool
    interleaved: bool = False

    def parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """(…, d) of the gate and (…, d) of the up map, out of (…, 2d)."""
        if self.interleaved:
            one, other = outputs[..., ::2], outputs[..., 1::2]
        else:
            one, other = outputs.chunk(2, -1)
        return (one, other) if self.gate_first else (other, one)

    def together(self, gate: Tensor, up: Tensor) -> Tensor:
        """(2d,) out of (d,) and (d,)."""
        both = (gate, up) if self.gate_first else (up, gate)
        return torch.stack(both, 1).reshape(-1) if self.interleaved else torch.cat(both)

    def outputs_of(self, units: Tensor, count: int) -> Tensor:
        """Which outputs a map of these units has, of one of `count` units, in the order in which it has them."""
        gate, up = self.parts(torch.arange(2 * count, device=units.device))
        return self.together(gate[units], up[units])


@dataclass(frozen=True)
class Lain:
    """Where a tensor lay, which may be gone by now.

    Attributes:
        memory: the same for tensors that share it.
        offset, shape, strides: in elements of it.
    """

    memory: StorageWeakRef
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Lain:
        """That of a tensor that is there."""
        return cls(StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset()), tensor.shape, tensor.stride())

    @property
    def rows(self) -> tuple[int, int] | None:
        """How many rows (…, features) has, and how far one is from the next; None if they are not even."""
        count, apart = 1, 0
        for size, stride in reversed(list(zip(self.shape[:-1], self.strides[:-1], strict=True))):
            if size != 1 and count != 1 and stride != count * apart:
                return None
            apart = stride if count == 1 and size != 1 else apart
            count *= size
        return count, apart

    def halves(self, gate: Lain) -> Halves | None:
        """How `gate` is a half of what this map put out; None if it is no view of a half of its outputs."""
        units, odd = divmod(self.shape[-1], 2)
        apart, step = gate.offset - self.offset, self.strides[-1]
        if self.memory != gate.memory or odd or gate.shape[-1] != units or gate.rows is None or gate.rows != self.rows:
            return None
        if gate.strides[-1] == step and apart in (0, units * step):
            return Halves(apart == 0)
        if gate.strides[-1] == 2 * step and apart in (0, step):
            return Halves(apart == 0, interleaved=True)
        return None
