"""What a training run has written of itself: λ of every layer, and the ReLU gap, over its steps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HARDNESS, _RELU = "hardness/", "relu_"
_TIMING = ("runtime", "_per_second", "preparation_time")


@dataclass(frozen=True)
class RunHistory:
    """What `trainer_state.json` holds of a run.

    Attributes:
        history: `log_history`.
        learned: {module name: λ} at the switch; empty where the run has not come to it, or that is not known.
        step: the last one.
    """

    history: Sequence[Mapping[str, Any]]
    learned: Mapping[str, float] = field(default_factory=dict)
    step: int = 0

    @property
    def last(self) -> dict[str, float]:
        """{module name: λ} as logged last."""
        for entry in reversed(self.history):
            found = {key.removeprefix(_HARDNESS): value for key, value in entry.items() if key.startswith(_HARDNESS)}
            if found:
                return found
        return {}


def read_run(folder: str | os.PathLike[str]) -> RunHistory:
    """The run whose folder, or the checkpoint whose folder, this is: of several states that of the last step.

    Raises:
        ValueError: there is no such folder, or no `trainer_state.json` in it that can be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder: expected that of a run, or of one of its checkpoints")
    names = [name for name in os.listdir(root) if _CHECKPOINT.fullmatch(name)]
    places = [root, *(root / name for name in sorted(names, key=lambda name: int(name.partition("-")[2]), reverse=True))]
    states = (state for place in places if (state := _read(place / _STATE)) is not None)
    found = next(states, None)
    if found is not None and (root / _STATE).is_file():  # of save_state(): later than the checkpoints, or of an older run
        found = max((found, *islice(states, 1)), key=lambda state: state["global_step"])
    if found is None:
        there = ", ".join(sorted(os.listdir(root))[:5]) or "nothing"
        raise ValueError(
            f"{str(folder)!r} holds no {_STATE} that can be read, nor does a checkpoint-<step> in it: it has {there}. A "
            "Trainer writes one with each checkpoint (save_strategy), and by trainer.save_state()"
        )
    return RunHistory(found["log_history"], _learned(found), found["global_step"])


def traces(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """{module name: [(step, λ)]} of what was logged."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(_HARDNESS):
                found.setdefault(key.removeprefix(_HARDNESS), []).append((entry["step"], value))
    return found


def relu_gaps(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, its value with the gates as ReLU minus that with the gates as they were)]}."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            name = key.replace(_RELU, "", 1)
            if _RELU in key and name in entry and not key.endswith(_TIMING) and isinstance(value, (int, float)):
                found.setdefault(name.removeprefix("eval_"), []).append((entry["step"], value - entry[name]))
    return found


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state["global_step"], int) and isinstance(state["log_history"], list):
            return dict(state)
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning(f"{str(path)!r} is damaged or was not written to its end, and is left out")
    return None


def _learned(state: Mapping[str, Any]) -> dict[str, float]:
    for callback in (state.get("stateful_callbacks") or {}).values():
        attributes = callback.get("attributes") if isinstance(callback, dict) else None
        if isinstance(attributes, dict) and attributes.get("at_switch"):
            return dict(attributes["at_switch"])
    return {}
