"""The evaluation with the gates as ReLU, beside the one before it: what a subclass gathers belongs to the first alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..surgery.gates import gates_as_relu

if TYPE_CHECKING:
    from .trainer import LambdaGELUTrainer

# what a subclass gathers in: metrics by name, lists of values
_CONTAINERS = (dict, defaultdict, OrderedDict, list, set, deque)
_NOT_GATHERED = {"train_dataset", "eval_dataset", "callback_handler", "args"}


def evaluate_twice(trainer: LambdaGELUTrainer, loop: Callable[[str], EvalLoopOutput], prefix: str) -> EvalLoopOutput:
    """What `loop(prefix)` returns, with the metrics of a second one, with the gates as ReLU, added as `<prefix>_relu_*`.

    In one loop, so that one log line, one callback event and the choice of the best checkpoint see both.
    """
    output = loop(prefix)
    with gates_as_relu(trainer.model), without_a_trace(trainer):
        relu = loop(f"{prefix}_relu").metrics or {}
    if output.metrics is not None:
        output.metrics.update({name: value for name, value in relu.items() if "preparation_time" not in name})
    return output


@contextmanager
def without_a_trace(trainer: Trainer) -> Iterator[None]:
    """Within the block, the trainer evaluates; afterwards its attributes, and what is in its lists and dicts, are as before.

    Trainers that gather metrics in `compute_loss` (TRL's) log them after the evaluation: those of a second one would be
    mixed with the first one's.
    """
    attributes = dict(vars(trainer))
    gathered = [value for name, value in attributes.items() if name not in _NOT_GATHERED and type(value) in _CONTAINERS]
    contents = [(container, _copied(container)) for container in _nested(gathered)]
    try:
        yield
    finally:
        for name in set(vars(trainer)) - set(attributes):
            delattr(trainer, name)
        vars(trainer).update(attributes)
        for container, content in contents:
            container.clear()
            container.update(content) if isinstance(container, (dict, set)) else container.extend(content)


def _nested(containers: list[Any]) -> list[Any]:
    """The containers and those in them, each once."""
    found: dict[int, Any] = {}
    waiting = list(containers)
    while waiting:
        container = waiting.pop()
        if id(container) not in found:
            found[id(container)] = container
            values = container.values() if isinstance(container, dict) else container
            waiting += [value for value in values if type(value) in _CONTAINERS]
    return list(found.values())


def _copied(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)
