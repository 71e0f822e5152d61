"""The evaluation with the gates as ReLU, beside the one before it: what a subclass gathers belongs to the first alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..measurement.forward import random_state_kept
from ..structure.scratch import scratch_folder
from ..surgery.gates import gates_as_relu
from ..surgery.refit.store import Store

if TYPE_CHECKING:
    from .trainer import LambdaGELUTrainer

logger = logging.get_logger(__name__)

# what a subclass gathers in: metrics by name, lists of values
_CONTAINERS = (dict, defaultdict, OrderedDict, list, set, deque)
_NOT_GATHERED = {"train_dataset", "eval_dataset", "callback_handler", "args", "model", "trainer"}


def evaluate_twice(
    trainer: LambdaGELUTrainer, loop: Callable[[Any, str], EvalLoopOutput], dataloader: DataLoader[Any], prefix: str
) -> EvalLoopOutput:
    """What `loop(dataloader, prefix)` returns, and as `<prefix>_relu_*` the metrics of another one, with the gates as ReLU.

    In one, so that one log line, one callback event and the choice of the best checkpoint see both. Random numbers go on as
    if there were one evaluation. Both see the same batches. A stream is read once: they are kept on disk for the second one.
    """
    stream = _is_stream(dataloader)
    if stream and (trainer.args.world_size > 1 or trainer.args.batch_eval_metrics):  # both ask the loader where it ends
        logger.warning_once(
            "the evaluation set is a stream, which may be read once: with several processes or batch_eval_metrics it is not "
            "evaluated with the gates as ReLU, and eval_relu_* are missing. Use a set with length and index for them"
        )
        return loop(dataloader, prefix)
    with _kept(dataloader, trainer.args.device) if stream else nullcontext((dataloader, dataloader)) as (first, second):
        order = _order(dataloader)
        output = loop(first, prefix)
        _set_back(order)
        with gates_as_relu(trainer.model), without_a_trace(trainer), random_state_kept(trainer.model):
            gathered = _gathered(trainer)
            before = {name: len(values) for name, values in gathered.items()}
            relu = dict(loop(second, f"{prefix}_relu").metrics or {})
            for name, values in gathered.items():
                new = values[before.get(name, 0) :]
                if new:
                    relu[f"{prefix}_relu_{name}"] = sum(new) / len(new)
    trainer.callback_handler.eval_dataloader = dataloader
    if output.metrics is not None:
        output.metrics.update({name: value for name, value in relu.items() if "preparation_time" not in name})
    return output


def _gathered(trainer: LambdaGELUTrainer) -> dict[str, list[float]]:
    """{name: values} of an evaluation, where TRL's trainers gather them and log their mean."""
    metrics = getattr(trainer, "_metrics", None)
    found = metrics.get("eval") if isinstance(metrics, dict) else None
    return found if isinstance(found, dict) else {}


def _is_stream(dataloader: DataLoader[Any]) -> bool:
    """Whether the data come one after another, and perhaps once."""
    dataset = getattr(dataloader, "dataset", None)
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _order(dataloader: Any) -> list[tuple[Any, dict[str, Any]]]:
    """What says in which order a loader gives its examples: some shuffle those of evaluation too, each time otherwise."""
    found: list[tuple[Any, dict[str, Any]]] = []
    waiting, seen = [dataloader], set()
    while waiting:
        owner = waiting.pop()
        if id(owner) in seen or not hasattr(owner, "__dict__"):
            continue
        seen.add(id(owner))
        state = {name: value for name, value in vars(owner).items() if name in ("epoch", "iteration")}
        generator = vars(owner).get("generator")
        if isinstance(generator, torch.Generator):
            state["generator"] = generator.get_state()
        found.append((owner, state))
        waiting += [value for name, value in vars(owner).items() if name in ("sampler", "batch_sampler", "base_dataloader")]
    return found


def _set_back(order: list[tuple[Any, dict[str, Any]]]) -> None:
    for owner, state in order:
        for name, value in state.items():
            if name == "generator":
                owner.generator.set_state(value)
            else:
                setattr(owner, name, value)


class _Loader:
    """Batches, and otherwise the loader that they are from."""

    def __init__(self, loader: DataLoader[Any], batches: Callable[[], Iterator[Any]]) -> None:
        self._loader, self._batches = loader, batches

    def __iter__(self) -> Iterator[Any]:
        return self._batches()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


@contextmanager
def _kept(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Two loaders: the first keeps on disk the batches that it gives, the second gives these."""
    with scratch_folder() as folder:
        store, count = Store(folder, device), 0

        def keeping() -> Iterator[Any]:
            nonlocal count
            for batch in loader:
                store.put(str(count), dict(batch) if hasattr(batch, "keys") else batch)  # a BatchEncoding is no dict
                count += 1
                yield batch

        yield _Loader(loader, keeping), _Loader(loader, lambda: (store.get(str(index)) for index in range(count)))


@contextmanager
def without_a_trace(trainer: LambdaGELUTrainer) -> Iterator[None]:
    """Within the block, the trainer evaluates; afterwards its attributes, and what is in its lists and dicts, are as before.

    Trainers that gather metrics in `compute_loss` (TRL's) log them after the evaluation, and sentence-transformers writes
    what its evaluators find onto the model's card: those of a second one would be mixed with the first one's.
    """
    owners = [trainer, *filter(None, [getattr(trainer.model, "model_card_data", None)])]
    before = [(owner, dict(vars(owner))) for owner in owners]
    values = [value for _, attributes in before for name, value in attributes.items() if name not in _NOT_GATHERED]
    contents = [(container, _copied(container)) for container in _nested(values)]
    try:
        yield
    finally:
        for owner, attributes in before:
            for name in set(vars(owner)) - set(attributes):
                delattr(owner, name)
            vars(owner).update(attributes)
        for container, content in contents:
            _restore(container, content)


def _nested(values: list[Any]) -> list[Any]:
    """The containers and tensors among the values, and those in them, each once; parameters are none of them."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        gathers = type(value) in _CONTAINERS or (isinstance(value, Tensor) and not isinstance(value, nn.Parameter))
        if gathers and id(value) not in found:
            found[id(value)] = value
            if not isinstance(value, Tensor):
                waiting += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _copied(container: Any) -> Any:
    if isinstance(container, Tensor):
        return container.detach().clone(), container._version
    return dict(container) if isinstance(container, dict) else list(container)


def _restore(container: Any, content: Any) -> None:
    if isinstance(container, Tensor):
        value, version = content
        if container._version != version:  # a sum that was added to in place
            container.detach().copy_(value)
        return
    container.clear()
    container.update(content) if isinstance(container, (dict, set)) else container.extend(content)
