"""What a cell of the matrix is, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Cell:
    """One way of training.

    Attributes:
        optimizer: "AdamW", "SGD", …; what a reader would look for.
        precision: "fp32", "bf16" (autocast), "pure bf16" (weights in bf16).
        engine: "one process", "DDP × 2", "FSDP2 × 2", "ZeRO-2 × 2", …
        trainer: "Trainer", "Seq2SeqTrainer", "SFTTrainer", "own loop", …
    """

    optimizer: str
    precision: str
    engine: str
    trainer: str


@dataclass(frozen=True)
class Outcome:
    """What a cell came to.

    Attributes:
        verdict: "equal": the figure is within its bound; "refused": by name, before a step was taken; "off": neither.
        figure: the largest relative difference of λ, over sites and steps, to the twin; None for a refusal.
        text: of the refusal; else what the twin is and what was compared.
    """

    verdict: str
    figure: float | None
    text: str


class Part(Protocol):
    """A module of this folder that has cells: `python -m scripts.matrix.run` asks each in a process of its own."""

    CELLS: Sequence[Cell]

    def measure(self, cell: Cell) -> Outcome:
        """Trains that way, and its twin."""
        ...
