"""Five hinges of unlike weights, which no gate has, and their sum in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_lambda_gelu.surgery.hinges.minimax import Minimax

# not symmetric, as those of minimax are
UNEVEN = Minimax((-2.0, -0.5, 0.1, 0.7, 3.0), (0.1, 0.4, 0.3, 0.4, -0.2), 0.5)


def uneven_sum(z: Any, hardness: float) -> Any:
    """Σᵢ aᵢ relu(z − tᵢ/λ), of a number or an array."""
    return sum(a * np.maximum(z - t / hardness, 0.0) for a, t in zip(UNEVEN.weights, UNEVEN.at, strict=True))
