"""A network whose FFN can be sparse, and a count of how often the kernel of `sparsify_ffn` answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Calls(dict[str, int]):
    """How often the kernel gave an answer, and how often more units fired than pays."""

    def counted(self, name: str, run: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def counting(*args: Any) -> Tensor | None:
            out = run(*args)
            key = name if out is not None else f"{name}, dense"
            self[key] = self.get(key, 0) + 1
            return out

        return counting


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
