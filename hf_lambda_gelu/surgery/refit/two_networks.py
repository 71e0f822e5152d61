"""The smooth network and the substituted one in a single model, and the calibration set on disk that both run over.

Which of the two the model is, is its state:

| state | how | weights | gates |
|---|---|---|---|
| `Network.SMOOTH` | within `smooth()` | those of before | λ-GELU |
| `Network.SUBSTITUTED` | within `substituted()` | those of now, in part refit | ReLU where it is substituted by now |
| None | outside of both | as `SUBSTITUTED` | as `SMOOTH` |

Outside of both the model is neither network, and whoever runs it here is refused. `smooth()` may be within `smooth()`; no
other two may be within each other. After `undo` weights, gates, biases and config are those of before, to the bit.

Refit weights lie in memory of their own until `commit` puts them where the original ones were, so that other tensors of the
same memory (a state_dict, shared memory) see the original weights while the work goes on, and the refit ones afterwards.
The copies that DeepSpeed steps get them then, too. Layers may be wider in the substituted network: then the parameters
around a site have wider data there, and what modules hold of the width goes with it; such data stays where it is at the end.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...activation.copies import renew_stepped_copies, stepped_copy
from ...activation.module import hardness_sites
from ...measurement.batches import FORWARD_ERRORS, forward_failed
from ...measurement.forward import call, same_random_numbers
from ...measurement.team import ALONE, Team
from ...measurement.towers import Towers
from ...structure.autocast import Autocast
from ...structure.block_source import device_of
from ...structure.edits import reshape
from ...structure.linear_maps import LinearMap
from ...structure.transaction import keep
from .biases import AddedBiases
from .dealt_batches import DealtBatches
from .report import CompensatedSite
from .ridge import Correction
from .sources import RefitWeights
from .store import Store

# (module, attribute, number in the smooth network, number in the substituted one)
Number = tuple[nn.Module, str, int, int]


@dataclass(frozen=True)
class Wide:
    """A layer that is wider in the substituted network: the parameters around its site, and the numbers that go with it."""

    parameters: tuple[nn.Parameter, ...]
    numbers: tuple[Number, ...]


class Network(Enum):
    """One of the two networks."""

    SMOOTH = "smooth"
    SUBSTITUTED = "substituted"


class TwoNetworks:
    """The two networks, whose weights and gates are exchanged in one model: see the table of states above.

    Attributes:
        state: which network the model is; None if neither.
        hard: the sites that are ReLU in the substituted network by now.
        originals: the parameters that were refit, with what they were, in the memory that was theirs; after `commit` a copy.
        biases: those that the maps were given.
        team: the processes that refit together, each on its own share of the batches.
        batches: the calibration set.
        autocast: the state of autocast at the start.
        towers: knows which mask belongs to what runs.
        weights: where refit weights rest, if the model's weights come and go with its blocks; None otherwise.
        wide: site → what is wider around it.
    """

    def __init__(self, model: nn.Module, folder: Path, weights: RefitWeights | None = None, team: Team = ALONE) -> None:
        self.model, self.team = model, team
        self.sites = hardness_sites(model)
        self.store = Store(folder, device_of(model))
        self.batches = DealtBatches(model, self.store, team)
        self.autocast = Autocast.now(model)
        self.towers = Towers(model, self.sites.values())
        self.state: Network | None = None
        self.hard: set[str] = set()
        self.originals: dict[nn.Parameter, Tensor] = {}
        self.biases = AddedBiases(model)
        self.weights = weights
        self.wide: dict[str, Wide] = {}
        self._committed: dict[nn.Parameter, Tensor] = {}  # the memory into which refit weights were put

    # ------------------------------------------------------------------------------------------- the two networks

    @contextmanager
    def smooth(self) -> Iterator[None]:
        """Within the block, the model is the smooth network."""
        with self._as(Network.SMOOTH), self._originals_in(self.originals, self.wide):
            yield

    @contextmanager
    def substituted(self, *more: str) -> Iterator[None]:
        """Within the block, the model is the network as substituted so far, the sites in `more` too."""
        hard = self.hard | set(more)
        smooth = [name for name in self.wide if name not in hard]  # a smooth gate is that of the layer as it was
        parameters = [parameter for name in smooth for parameter in self.wide[name].parameters]
        with self._as(Network.SUBSTITUTED), self._originals_in(parameters, smooth):
            try:
                self._gates(hard)
                yield
            finally:
                self._gates(set())

    @contextmanager
    def _originals_in(self, parameters: Iterable[nn.Parameter], sites: Iterable[str]) -> Iterator[None]:
        """Within the block, the parameters have their original data, and modules around the sites what goes with it."""
        now = {parameter: parameter.data for parameter in parameters}
        numbers = [number for name in sites for number in self.wide[name].numbers]
        try:
            for parameter in now:
                parameter.data = self.originals[parameter]
            for module, attribute, narrow, _ in numbers:
                setattr(module, attribute, narrow)
            yield
        finally:
            for parameter, data in now.items():
                parameter.data = data
            for module, attribute, _, wide in numbers:
                setattr(module, attribute, wide)

    @contextmanager
    def _as(self, network: Network) -> Iterator[None]:
        before = self.state
        if before is not None and (before, network) != (Network.SMOOTH, Network.SMOOTH):
            raise RuntimeError(
                f"the model is the {before.value} network: leave that block before it becomes the {network.value}"
            )
        self.state = network
        try:
            yield
        finally:
            self.state = before
            torch.clear_autocast_cache()  # it holds casts of this network's weights

    def check(self) -> None:
        """RuntimeError where the model is neither network: what it computes there is of no use."""
        if self.state is None:
            raise RuntimeError("the model is neither network here: run it within smooth() or substituted()")

    def correct(self, linear: LinearMap, correction: Correction) -> None:
        """Let the linear map of the substituted network be corrected; the smooth network keeps its own."""
        if correction.method == "none":
            return
        for parameter in (linear.parameter, linear.bias):
            if parameter is not None and parameter not in self.originals:
                self.originals[parameter] = parameter.data
                parameter.data = parameter.data.clone()
        linear.add(correction.weight, correction.bias)

    def widen(self, site: str, data: Mapping[nn.Parameter, Tensor], numbers: Iterable[Number]) -> None:
        """Let parameters around a site have wider data in the substituted network, and modules what goes with it."""
        self.wide[site] = Wide(tuple(data), tuple(numbers))
        for parameter, wide in data.items():
            parameter.grad = None  # it has the shape of before
            self.originals.setdefault(parameter, parameter.data)
            parameter.data = wide
        for module, attribute, _, wide_number in self.wide[site].numbers:
            setattr(module, attribute, wide_number)

    def holding(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Within the block, these weights of both networks stay in memory."""
        return nullcontext() if self.weights is None else self.weights.holding(parameters, self.originals)

    def expect(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> None:
        """Let whoever keeps the weights know which will be changed, and the shapes that they will have."""
        if self.weights is not None:
            self.weights.expect(shapes)

    def done_earlier(self, sites: Sequence[str]) -> tuple[list[CompensatedSite], Mapping[str, Any]] | None:
        """What a killed process did in the block with these sites, whose weights are refit then; None if nothing."""
        return None if self.weights is None else self.weights.earlier(sites, self.originals)

    def take_states(self, sites: Sequence[str]) -> None:
        """Let the store have the states after the block with these sites that a killed process kept, if it kept any."""
        if self.weights is not None:
            self.weights.take_states(sites, self.store)

    def note_done(
        self, sites: Sequence[str], made: Sequence[CompensatedSite], states: Sequence[str], wider: Mapping[str, Any]
    ) -> None:
        """Let whoever goes on after a kill know that the block with these sites is done.

        Args:
            states: the names of states in the store that are not found again, to the bit, by running the block.
            wider: what there is to say of layers that are wider.
        """
        if self.weights is not None:
            self.weights.note(sites, made, self.store, states, wider)

    def leave(self) -> None:
        """Let the model be neither network: where an interrupt came upon the end of a block, that may not have happened."""
        self._gates(set())
        self.state = None

    def commit(self) -> None:
        """Put the refit weights into the memory of the original ones, kept for `undo`; wider ones stay in theirs.

        Where weights come and go with blocks, what keeps them puts most of them where they are to stay.
        """
        left = set(self.originals) if self.weights is None else self.weights.commit(self.originals)
        for parameter, memory in [(p, memory) for p, memory in self.originals.items() if p in left]:
            if parameter.shape != memory.shape:
                reshape(parameter, parameter.data)
                continue
            before = memory.clone()
            keep(memory, before)
            self._committed[parameter] = memory
            self.originals[parameter] = before
            memory.copy_(parameter.data)
            parameter.data = memory
        for parameter in self.originals:
            copy = stepped_copy(parameter)
            if copy is not None:
                keep(copy)
        renew_stepped_copies(self.originals)

    def undo(self) -> None:
        """Let the model be what it was, from any state."""
        self.leave()
        for parameter, original in self.originals.items():
            memory = self._committed.get(parameter)
            if parameter.shape != original.shape:
                reshape(parameter, original)
            parameter.data = original if memory is None else memory.copy_(original)
        for module, attribute, narrow, _ in [number for wide in self.wide.values() for number in wide.numbers]:
            setattr(module, attribute, narrow)
        self.wide.clear()
        renew_stepped_copies(self._committed)
        self._committed.clear()
        self.originals.clear()
        self.hard.clear()
        self.biases.remove()

    def _gates(self, hard: set[str]) -> None:
        for name, site in self.sites.items():
            site.as_relu = name in hard

    # -------------------------------------------------------------------------------------------------- the batches

    def forward(self, index: int) -> Callable[[], Any]:
        """The model's forward on an own batch, the same each time even if the model draws random numbers.

        It runs in the autocast in which the refit was asked for, and `towers` follows it.
        """
        return self._forward(self.batches.get(index), self.batches.sizes[index], self.batches.called(index))

    def forward_of_all(self, number: int) -> Callable[[], Any]:
        """`forward` on a batch of all: each process runs it, on the same batch."""

        def run() -> Any:
            return self._forward(self.batches.shown(number), self.batches.deal.size(number), self.batches.called(number))()

        return run

    def _forward(self, batch: dict[str, Any], size: int, index: int) -> Callable[[], Any]:
        extra = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}

        def run() -> Any:
            self.check()
            quiet = warnings.catch_warnings()
            with same_random_numbers(self.model), quiet, self.autocast.entered():
                try:
                    with self.towers.following(size, batch):
                        return call(self.model, {**batch, **extra})
                except FORWARD_ERRORS as error:
                    raise forward_failed(self.model, index, error, batch) from error

        return run
