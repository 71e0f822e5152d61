"""A verb is a transaction: it succeeds, or the model and the process are as they were, whatever was raised at whatever line.

A snapshot of a model holds the identity of all that it is made of: modules and their classes, parameters, hooks, attributes
and configs, with the contents of every dict, list and set among them. Parameters' data is not copied: a verb calls `keep` on
a tensor before it writes into it. Buffers are small and are copied.

Random numbers, transformers' tables and torch's modes belong to the process and not to a model. So one lock, held by every
verb, lets verbs of several threads run one after the other. It is re-entrant: a verb may call another.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from .process_state import process_state

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.RLock()
_OPEN = threading.local()  # .snapshots: those of the verbs that this thread is in, the innermost last

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def transaction(verb: Callable[P, R]) -> Callable[P, R]:
    """Makes a verb whose first argument is a model a transaction, and lets it run while no verb of another thread does.

    An argument that is no module is not looked at; the process's state is put back all the same.
    """

    @functools.wraps(verb)
    def whole(*args: P.args, **kwargs: P.kwargs) -> R:
        # From here on every Python call is inside `try`: a stop may come at any, also at the end of a `with` block.
        snapshots: list[Snapshot] = _OPEN.__dict__.setdefault("snapshots", [])
        depth, snapshot = len(snapshots), None
        try:
            with _LOCK:
                model = args[0] if args else kwargs.get("model")
                snapshot = Snapshot(model if isinstance(model, nn.Module) else None)
                snapshots.append(snapshot)
                result = verb(*args, **kwargs)
                del snapshots[depth:]
                if depth:  # what the outer verb must put back if it fails later
                    for key, kept in snapshot.kept.items():
                        snapshots[-1].kept.setdefault(key, kept)
                return result
        except BaseException as error:
            del snapshots[depth:]
            if snapshot is not None:
                with _LOCK:
                    try:
                        _end_blocks(error)
                        snapshot.restore()
                    except BaseException:  # a second stop: once more, from the start
                        snapshot.restore()
                        raise
            raise

    return whole


def keep(tensor: Tensor, values: Tensor | None = None) -> None:
    """To be called before a verb writes into `tensor`: keeps its values until the verb has succeeded.

    Args:
        values: a copy of them, where the caller has one.
    """
    data: Any = tensor.detach()
    data = data.to_local() if hasattr(data, "to_local") else data  # of one that FSDP2 has cut up, this process's part
    for snapshot in _OPEN.__dict__.get("snapshots", [])[-1:]:
        key = (data.data_ptr(), data.shape, data.stride())
        if key not in snapshot.kept:
            snapshot.kept[key] = (data, data.clone() if values is None else values)


def if_it_fails(undo: Callable[[], None]) -> None:
    """To be called before a verb changes something beside the model: `undo` runs, perhaps twice, if the verb fails."""
    for snapshot in _OPEN.__dict__.get("snapshots", []):
        snapshot.undo.append(undo)


def _end_blocks(error: BaseException | None) -> None:
    """Let blocks end that a stop left half-way: a generator that the traceback holds would end after `restore`."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # it still runs
                    frame.clear()
        error = error.__context__


class Snapshot:
    """What a model and the process are now, to be put back by `restore`, which may be called any number of times.

    Attributes:
        kept: place in memory → (tensor, its values), of the tensors that were written into.
        undo: what else is to be done on `restore`.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}
        self.undo: list[Callable[[], None]] = []
        self._contents: list[tuple[Any, list[Any]]] = []
        self._tensors: list[_TensorState] = []
        self._classes = [] if model is None else [(module, type(module)) for module in model.modules()]
        for found in () if model is None else _reachable(model):
            if isinstance(found, Tensor):
                self._tensors.append(_TensorState(found))
            else:
                self._contents.append((found, _content(found)))
        self._process = process_state({state.tensor.device for state in self._tensors})

    def restore(self) -> None:
        """Put everything back."""
        for put in self._process:
            put()
        for module, cls in self._classes:
            if type(module) is not cls:
                module.__class__ = cls
        for container, content in self._contents:
            if not _alike(_content(container), content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for state in self._tensors:
            state.restore()
        for tensor, values in self.kept.values():
            tensor.copy_(values)
        for undo in self.undo:
            undo()


class _TensorState:
    """Where a tensor's data is, and what belongs to the tensor itself; of one that is no parameter, its values too."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.place = _place(tensor)
        self.data = None if self.place is None else tensor.data
        self.values = None
        if self.data is not None and not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            self.values = self.data.clone()
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None

    def restore(self) -> None:
        tensor = self.tensor
        if self.data is not None and _place(tensor) != self.place:
            tensor.data = self.data
        if self.data is not None and self.values is not None and not _same_bits(self.data, self.values):
            self.data.copy_(self.values)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where the data is, and how it is read; None for a tensor without such a place (quantised, sparse, distributed)."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return None
    try:
        return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
    except (RuntimeError, NotImplementedError):  # nested, fake
        return None


def _same_bits(tensor: Tensor, values: Tensor) -> bool:
    return torch.equal(tensor, values)  # NaN counts as changed, and is written again: the same


def _reachable(model: nn.Module) -> Iterator[Any]:
    """The tensors and containers that a model is made of, each once; what a config holds too."""
    seen: dict[int, Any] = {}
    stack: list[Any] = [model]
    while stack:
        found = stack.pop()
        if isinstance(found, (nn.Module, PreTrainedConfig, GenerationConfig)):
            found = vars(found)
        if id(found) in seen:
            continue
        seen[id(found)] = found  # kept, or another object might get its id
        if isinstance(found, Tensor):
            yield found
            continue
        if type(found) in _CONTAINERS:
            yield found
        values = found.values() if isinstance(found, dict) else found
        stack += [value for value in values if isinstance(value, _LOOKED_INTO)]


_LOOKED_INTO = (nn.Module, PreTrainedConfig, GenerationConfig, Tensor, *_CONTAINERS, tuple)


def _content(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _alike(now: list[Any], before: list[Any]) -> bool:
    """Whether both hold the same objects in the same order; the pairs of a dict are made anew each time."""
    if len(now) != len(before):
        return False
    for one, other in zip(now, before, strict=True):
        pairs = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 2
        if not (one is other or (pairs and one[0] is other[0] and one[1] is other[1])):
            return False
    return True
