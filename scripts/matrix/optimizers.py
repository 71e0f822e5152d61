"""Optimizers: every name that transformers' Trainer knows, optimizers that are handed to it, and those of own loops.

Each run has thirty steps. Its λ after every step, after `optimizer.eval()` where there is one, and in what is saved at the
end, are compared with those of the twin (see twin.py), which the plain Trainer or a plain loop trains with the same
optimizer, λ in a group of its own, without weight decay, clipped to ≥ 1 after each step. The twin gets the run's other
weights after each step; in bf16, where two formulas for one gradient differ by their roundings, also the gradients of λ, if
these are as good as the twin's own. A run that clips nothing, or whose λ stays, shows nothing and counts as off.
"""

from __future__ import annotations

import torch

from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.in_loop import LOOPS, with_loop
from scripts.matrix.in_trainer import WAYS, with_trainer

COMMON = ("adamw_torch_fused", "sgd", "adafactor", "lion_32bit", "schedule_free_adamw")
COMMON_LOOP = ("AdamW", "SGD, momentum", "Adafactor (torch)", "Lion", "Muon + AdamW in one", "schedule-free AdamW")
HALF = ("bf16", "pure bf16")
CELLS = (
    *(Cell(name, "fp32", "one process", "Trainer") for name in WAYS),
    *(Cell(name, precision, "one process", "Trainer") for precision in HALF for name in COMMON),
    *(Cell(name, "fp32", "one process", "own loop") for name in LOOPS),
    *(Cell(name, precision, "one process", "own loop") for precision in HALF for name in COMMON_LOOP),
)


def measure(cell: Cell) -> Outcome:
    """λ of that way of training beside that of its twin."""
    torch.set_num_threads(1)
    return with_trainer(cell) if cell.trainer == "Trainer" else with_loop(cell)
