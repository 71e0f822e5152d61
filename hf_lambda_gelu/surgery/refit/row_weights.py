"""Weights of rows, so that a few with a huge stream do not own a fit: the first token of a window, in many language models.

A row counts min(1, m / ‖s‖²), s being the residual stream there and m the median of ‖s‖² over the first rows. [derived]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowWeights:
    """Attributes:
    reference: m; None until rows were seen.
    """

    reference: float | None = None

    def of(self, stream: Tensor) -> Tensor:
        """(n,) weights of rows (n, k), in (0, 1]."""
        squares = stream.float().square().sum(1)
        if self.reference is None and len(squares):
            self.reference = max(float(squares.median()), 1e-30)
        return ((self.reference or 1.0) / squares.clamp(min=1e-30)).clamp(max=1.0)
