"""Processes that work together on one calibration set: what each has found is joined, and if one fails, all of them raise.

A process works alone, or in the team of all processes of torch.distributed's default group. Every meeting of a team says
what it is for, and whether somebody has failed. A process that raises between two meetings holds the next one to tell so
(`Team.whole`); the others, whatever they meet for, learn it there, and raise the same kind of error.

Between two meetings each process goes its own way, and may `ask` for what only all of them can bring, weights of which each
has a part: the others come to answer when they ask themselves, or at their next meeting, which waits until nobody asks any
more.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, distributed, nn

from ..structure.block_source import device_of, source_of

T = TypeVar("T")

Processes = Literal["one", "all"]

# what a process that asks meets for
_ASKED = "an answer"
# (class of an error, its message)
Failure = tuple[type[Exception], str]


class DivergedError(RuntimeError):
    """The processes of a team do not do the same, or have not the same model. Each of them raises it."""


class OtherFailedError(Exception):
    """Another process has failed while this one asked, within a forward for one. It is no error of that; see `Team.whole`.

    Attributes:
        error: what to raise.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Team:
    """The processes that work together, seen from one of them. With one process nothing of it costs anything.

    All methods are meetings, or end with one: every process calls them, in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        device: where tensors go that another process has sent; None for where they were.
        dealt: whether the package has dealt out the batches itself, so that equal ones are no mistake.
        over: whether somebody has failed, and all know it.
        answer: called on every process with what some of them ask for.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    dealt: bool = False
    over: bool = False
    answer: Callable[[Collection[Any]], None] | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the first one, which has all sums and decides."""
        return self.rank == 0

    # ---------------------------------------------------------------------------------------------- what is joined

    def gathered(self, value: T, what: str) -> list[T]:
        """What each process has, by rank: small values, which are pickled."""
        return [value] if self.size == 1 else self._meet(what, value)

    def any(self, flag: bool, what: str) -> bool:
        """Whether one of the processes says so."""
        return any(self.gathered(flag, what))

    def same(self, value: T, what: str) -> T:
        """The value; DivergedError if it is not the same on every process."""
        values = self.gathered(value, what)
        for rank, other in enumerate(values):
            if other != values[0]:
                self.over = True
                raise DivergedError(
                    f"{what} is not the same on every process: {values[0]} on process 0, {other} on process {rank}"
                )
        return value

    def add_up(self, tensors: Iterable[Tensor], what: str) -> None:
        """Put the sums over all processes into the first one's tensors; what the others hold is of no use afterwards."""
        if self.size == 1:
            return
        tensors = list(tensors)
        self._meet(what, [tuple(tensor.shape) for tensor in tensors])
        with self._inside():
            for tensor in tensors:
                wire = tensor.to(_wire()).contiguous()
                distributed.reduce(wire, dst=0)
                if wire is not tensor and self.leads:
                    tensor.copy_(wire)

    def given(self, rank: int, value: T | None, what: str) -> T:
        """What the process of that rank has, on every process; tensors in it on `device`."""
        if self.size == 1:
            return cast("T", value)
        self._meet(what, rank)
        packed = io.BytesIO()
        if self.rank == rank:
            torch.save(value, packed)
        sent = [packed.getvalue()]
        with self._inside():
            distributed.broadcast_object_list(sent, src=rank)
        if self.rank == rank:
            return cast("T", value)
        # of the other processes of this program, not of a file
        return cast("T", torch.load(io.BytesIO(sent[0]), map_location=self.device, weights_only=False))

    def all_did(self, what: str) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            self._meet(what)

    def ask(self, wanted: Collection[Any]) -> None:
        """Let `answer` be called on every process, with what all who ask at the time want; the others need not ask."""
        self._meet(_ASKED, wanted)

    def led(self, make: Callable[[], T], what: str) -> T:
        """What the first process makes, on every process: decisions that rounding could turn."""
        return self.given(0, make() if self.leads else None, what)

    # ---------------------------------------------------------------------------------------------- when one fails

    @contextmanager
    def together(self, *expected: type[Exception]) -> Iterator[None]:
        """Each process does the block by itself; an error of these kinds that one has is raised on all, the last kind first.

        No meeting is held within the block, and one at its end. Other errors go to `whole`.
        """
        if self.size == 1:
            yield
            return
        found: Exception | None = None
        try:
            yield
        except expected as error:
            found = error
        kinds = [kind for kind in expected if isinstance(found, kind)][:1]
        worst = max(self.gathered(expected.index(kinds[0]) if kinds else -1, "what each has found"))
        if found is not None and kinds and expected.index(kinds[0]) == worst:
            raise found
        if worst >= 0:
            raise expected[worst]("on another process")

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around all that a team does: it succeeds on every process, or raises on every process."""
        if self.size == 1:
            yield
            return
        try:
            yield
            self._meet("the end")
        except OtherFailedError as error:
            raise error.error from None
        except BaseException as error:
            if not self.over:
                with suppress(Exception):  # they have ended
                    self._meet("a failure", failure=_failure(error))
            raise

    def _meet(self, what: str, value: Any = None, failure: Failure | None = None) -> list[Any]:
        """What each process has; the error of the first that has failed; DivergedError if they meet for different things.

        Those who ask are answered first.
        """
        while True:
            found = self._exchanged(what, value, failure)
            failures = [(rank, failed) for rank, (_, _, failed) in enumerate(found) if failed is not None]
            if failures:
                self.over = True
                if failure is None:
                    error = _error(*failures[0])
                    raise OtherFailedError(error) if what == _ASKED else error
                return []
            asked = {one for name, wanted, _ in found if name == _ASKED for one in wanted}
            if not asked:
                break
            assert self.answer is not None
            with self._inside():
                self.answer(asked)
            if what == _ASKED:
                return []
        if len({name for name, _, _ in found}) > 1:
            self.over = True
            said = ", ".join(f"process {rank} {name!r}" for rank, (name, _, _) in enumerate(found))
            raise DivergedError(f"the processes do not do the same, though the batches of one decide for all: {said}")
        return [had for _, had, _ in found]

    def _exchanged(self, what: str, value: Any, failure: Failure | None) -> list[Any]:
        found: list[Any] = [None] * self.size
        try:
            with self._inside():
                distributed.all_gather_object(found, (what, value, failure))
        except RuntimeError as error:
            ended = RuntimeError(
                f"another of the {self.size} processes that work together has ended, or cannot be reached ({error})"
            )
            raise (OtherFailedError(ended) if what == _ASKED else ended) from error
        return found

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Around what the processes do in one step: who is stopped here cannot tell the others any more."""
        try:
            yield
        except BaseException:
            self.over = True
            raise


ALONE = Team()


def team_of(processes: Processes | None, model: object, alone: str = "", dealt: bool = False) -> Team:
    """The team that `processes` asks for; "one" is this process alone.

    Args:
        dealt: as in `Team`.
        alone: what this process would do by itself for None, where several run and that must not happen by surprise.

    Raises:
        ValueError: an unknown `processes`; None, and several run; "all", and they were not brought together.
    """
    if processes not in (None, *get_args(Processes)):
        raise ValueError(f"unknown processes={processes!r}: expected 'one', 'all' or None")
    ready = distributed.is_available() and distributed.is_initialized()
    size = distributed.get_world_size() if ready else 1
    if processes is None and alone and size > 1:
        raise ValueError(
            f"{size} processes run, and it is not said whether they work together: processes='all', called on every one of "
            f"them with its own share of the batches, joins what they find; processes='one' lets this process {alone} by "
            "itself, be it the only one that calls, or one of several that all have the same batches"
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if os.environ.get("WORLD_SIZE", "1").isdigit() else 1
    if processes == "all" and not ready and started > 1:
        raise ValueError(
            f"{started} processes were started, and have not been brought together: make an accelerate.Accelerator(), or "
            "call torch.distributed.init_process_group(), before you ask for processes='all'"
        )
    if processes != "all" or size == 1:
        return ALONE
    device = device_of(model) if isinstance(model, nn.Module) else torch.device("cpu")
    return Team(distributed.get_rank(), size, device, dealt)


def check_same_weights(team: Team, model: nn.Module) -> None:
    """DivergedError unless the model has the same weights on every process, by the sums of their bits.

    Of weights that are cut up there is one copy, which all have together.
    """
    if team.size == 1:
        return
    source = source_of(model)
    here = {n: p.detach() for n, p in model.named_parameters() if source is None or not source.rests(p.data)}
    own = {name: _bits(data) for name, data in here.items() if not data.is_meta and data.numel()}
    every = team.gathered(own, "the weights")
    for rank, other in enumerate(every):
        for name in {**every[0], **other}:
            if every[0].get(name) != other.get(name):
                team.over = True
                raise DivergedError(
                    f"{type(model).__name__} is not the same on every process: {name} of process {rank} is not that of "
                    "process 0. Let all processes load the same weights before they work together"
                )


def _bits(tensor: Tensor) -> int:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
    return int(tensor.contiguous().reshape(-1).view(kind).sum(dtype=torch.int64))


def _wire() -> torch.device:
    """Where tensors are that the default group sends: accelerators' groups know none of the CPU's."""
    backend = str(distributed.get_backend())
    if any(name in backend for name in ("gloo", "mpi", "ucc", "undefined")):
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")


def _failure(error: BaseException) -> Failure:
    """What the others are told: the kind of error, if they can know it."""
    kind: type[Exception] = RuntimeError
    message = str(error)
    if isinstance(error, Exception):
        with suppress(Exception):
            pickle.dumps(type(error))
            kind = type(error)
    else:
        message = f"stopped by {type(error).__name__}. The model is as it was"
    return kind, message


def _error(rank: int, failure: Failure) -> Exception:
    kind, message = failure
    with suppress(Exception):
        return kind(f"process {rank}: {message}")
    return RuntimeError(f"process {rank}: {kind.__name__}: {message}")
