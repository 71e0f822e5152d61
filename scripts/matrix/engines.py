"""Engines: DDP, FSDP2 and DeepSpeed's ZeRO, on processes of this machine, each against one process with the whole batch.

Losses are means and the ranks' batches are of one size, so that the mean of their gradients is the gradient of one process.
λ starts at 1.1, is clipped to 1 on its way, and is learned for half of the steps. Then it goes to its target: at once, with
a refit of the weights, and where ZeRO-3 has cut these up along the ramp. Compared are λ of every site and the
loss of a batch, after every step: a refit that the next step undoes is seen in the loss.

With the Trainer, the run is also continued from a checkpoint of before the switch and from one of after it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.engine_runs import own_loop, with_trainer
from scripts.matrix.engine_setup import ENGINES, ONE, SAVED, START, STEPS, SWITCH, Engine, Record, prepare
from scripts.matrix.ranks import RankError, on_ranks

# of λ and of the loss. fp32: sums in another order. bf16: a gradient has 8 bits, and each engine rounds it elsewhere; one
# process in bf16 is 0.012 and 0.028 from one in fp32
BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (5e-2, 1e-1)}
CELLS = [
    Cell(optimizer, precision, engine, trainer)
    for engine in ENGINES
    for trainer in ("own loop", "Trainer")
    for precision in ("fp32", "bf16")
    for optimizer in ("SGD", "AdamW")
]


def apart(run: Record, twin: Record, skipped: int = 0) -> tuple[float, float]:
    """The largest relative difference of λ, and of the loss, to the twin, whose first steps are skipped."""
    pairs = list(zip(run["hardness"], twin["hardness"][skipped:], strict=True))
    hardness = max(abs(one[site] / other[site] - 1.0) for one, other in pairs for site in other)
    losses = zip(run["loss"], twin["loss"][skipped:], strict=True)
    return hardness, max(abs(one / other - 1.0) for one, other in losses)


def measure(cell: Cell) -> Outcome:
    """Train by the engine, on its processes, and in one process, and compare."""
    prepare()
    engine = ENGINES[cell.engine]
    run = partial(own_loop if cell.trainer == "own loop" else with_trainer, engine, cell.optimizer, cell.precision)
    same = {} if engine.refits else {"hardness_compensate": "none"}
    folder = Path(tempfile.mkdtemp(prefix="engines"))
    try:
        if cell.trainer == "own loop":
            twin = on_ranks(1, partial(own_loop, ONE, cell.optimizer, cell.precision, refit=engine.refits))[0]
            found = [apart(on_ranks(engine.processes, run)[0], twin)]
        else:
            twin = on_ranks(1, partial(with_trainer, ONE, cell.optimizer, cell.precision, **same))[0]
            found = [apart(on_ranks(engine.processes, partial(run, folder=folder))[0], twin)]
            found += [_continued(run, engine.processes, folder, step, twin) for step in SAVED]
    except RankError as error:
        last = str(error).strip().splitlines()[-1]
        refused = last.startswith("ValueError")
        return Outcome("refused" if refused else "off", None, last.removeprefix("ValueError: "))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _outcome(cell, engine, twin, found)


def _continued(run: Callable[..., Record], processes: int, folder: Path, step: int, twin: Record) -> tuple[float, float]:
    return apart(on_ranks(processes, partial(run, folder=folder, resume=step))[0], twin, step)


def _outcome(cell: Cell, engine: Engine, twin: Record, found: list[tuple[float, float]]) -> Outcome:
    hardness, loss = map(max, zip(*found, strict=True))
    learned = twin["hardness"][: SWITCH - 1]
    moved = min(max(abs(profile[site] - START) for profile in learned) for site in learned[0])
    text = f"one process: λ of {STEPS} steps, learned by {moved:.2f} and more; loss within {loss:.0e}"
    text += ", refit at the switch" if engine.refits else ", ramp"
    text += "" if cell.trainer == "own loop" else ", continued from checkpoints of before and after it"
    within = all(value <= bound for value, bound in zip((hardness, loss), BOUNDS[cell.precision], strict=True))
    equal = within and moved > 0.05
    return Outcome("equal" if equal else "off", hardness, text)
