"""Which checkpoint a run goes on from: the newest whole one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object  # it ships no types
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .whole_checkpoints import fault

logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_TRUE = "true"  # what --resume_from_checkpoint gets on a command line


def checkpoint_to_resume(asked: str | bool | None, args: TrainingArguments) -> str | bool | None:
    """The checkpoint to resume from, whole; for True, the newest whole one, and the broken ones after it are named.

    Where several processes do not see the same files, they take the newest that is whole for each of them.

    Args:
        asked: what `Trainer.train` takes. "true", where no folder has that name, is True.

    Raises:
        ValueError: the folder that was asked for, or every checkpoint there is, is broken; the message names the file.
    """
    if isinstance(asked, str) and asked.lower() == _TRUE and not os.path.exists(asked):
        asked = True
    if asked is None or asked is False:
        return asked
    if asked is not True:
        _check(Path(asked), args)
        return _told(Path(asked), asked)
    found = {step_of(folder): folder for folder in checkpoints(args.output_dir)}
    broken: dict[int, str] = {}
    good: list[int] = []
    for step, folder in found.items():
        why = fault(folder, args)
        if why is not None:
            broken[step] = f"{folder.name} is broken ({why})"
            continue
        good.append(step)
        if args.world_size == 1:
            break  # the newest of them
    if args.world_size > 1:
        good = sorted(set.intersection(*map(set, gather_object([good]))), reverse=True)
    if not found:
        return True  # Trainer says that there is none
    if not good:
        told = "; ".join(broken.values()) or "other processes lack what is there"
        raise ValueError(f"no checkpoint in {args.output_dir!r} is whole: {told}. Start a new run, without resuming")
    chosen = found[good[0]]
    newer = [step for step in found if step > good[0]]
    if newer:
        told = "; ".join(broken.get(step, f"{found[step].name} is not whole for another process") for step in newer)
        logger.warning(f"{told}: going on from {chosen.name}, the last good one")
    return _told(chosen, str(chosen))


def last_good(folder: str | os.PathLike[str] | None, args: TrainingArguments | None = None) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    return next((each for each in checkpoints(folder) if fault(each, args) is None), None)


def checkpoints(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folders `checkpoint-<step>` in a run's folder, the newest step first."""
    entries = os.listdir(folder) if folder is not None and os.path.isdir(folder) else []
    steps = {int(match[1]): name for name in entries if (match := _CHECKPOINT.fullmatch(name))}
    for step in sorted(steps, reverse=True):
        if Path(folder or "", steps[step]).is_dir():
            yield Path(folder or "", steps[step])


def before_a_save(folder: str | os.PathLike[str], step: int, args: TrainingArguments) -> None:
    """Lets the checkpoint that is about to be written be the last good one of a run's folder.

    One that is written over loses its last file first, so that it counts as broken until it is whole again. Broken ones of
    later steps, which a resumed run has passed over, are removed where `save_total_limit` removes checkpoints: it would keep
    them, as the newest, in the place of good ones.
    """
    Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}", TRAINER_STATE_NAME).unlink(missing_ok=True)
    for each in list(checkpoints(folder)) if args.save_total_limit else ():
        if step_of(each) > step and fault(each) is not None:
            shutil.rmtree(each, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The step of a folder `checkpoint-<step>`."""
    return int(folder.name.rpartition("-")[2])


def _check(folder: Path, args: TrainingArguments) -> None:
    why = fault(folder, args) if folder.is_dir() else "there is no such folder"
    if why is not None:
        good = last_good(folder.parent, args)
        hint = f"the last good checkpoint there is {str(good)!r}" if good else f"{str(folder.parent)!r} has no good one"
        raise ValueError(f"cannot resume from {str(folder)!r}: {why}; {hint}")


def _told(folder: Path, path: str) -> str:
    """`path`; what a checkpoint of `save_only_model` lacks is said."""
    if not any("optimizer" in name or name == "latest" for name in os.listdir(folder)):
        logger.warning(
            f"{folder.name} holds no optimizer, no learning rate schedule and no random state, as of "
            "save_only_model: they start anew"
        )
    return path
