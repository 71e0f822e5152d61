"""torch's autocast: the state that a call was made in, for a later run of the same call; and none, for sums of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Autocast:
    """By device type, whether autocast is on and with which dtype.

    Autocast keeps the casts of weights until its outermost block ends, and a weight that changes within it would go on as
    what it was. Within `entered` weights are cast anew at each use; a block of autocast inside keeps casts again, so whoever
    changes weights calls `torch.clear_autocast_cache`.
    """

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, model: nn.Module) -> Autocast:
        """The state at this point, on the CPU and on the devices of the model's weights."""
        devices = dict.fromkeys(["cpu", *(p.device.type for p in model.parameters() if p.device.type != "meta")])
        return cls(tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices))

    @property
    def off(self) -> Autocast:
        """The same devices, without autocast."""
        return Autocast(tuple((device, False, dtype) for device, _, dtype in self.states))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block, autocast is in this state."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.states:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            yield
