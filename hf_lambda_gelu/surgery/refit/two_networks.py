"""The smooth network and the substituted one in a single model, and the calibration set on disk that both run over."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ...activation.module import hardness_sites
from ...measurement.batches import FORWARD_ERRORS, CalibrationError, batch_size, forward_failed
from ...measurement.forward import call
from ...structure.config import get_attribute, put_attribute
from ...structure.config_probe import bias_attribute
from ...structure.edits import own_config
from ...structure.linear_maps import LinearMap
from .blocks import Arguments, Chain, capture, with_hidden, without_hidden
from .meeting_point import observe
from .store import Store


class Twin:
    """The smooth network and the substituted one in a single model, whose weights and gates are exchanged.

    `undo` brings the model back to the bit.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model = model
        self.sites = hardness_sites(model)
        self.store = Store(folder, next((p.device for p in model.parameters()), torch.device("cpu")))
        self.count = self.examples = 0  # batches in the store, and examples in them
        self.hard: set[str] = set()  # sites that are ReLU by now
        self.originals: dict[nn.Parameter, Tensor] = {}  # of the parameters that were refit
        self._added: list[tuple[nn.Module, str]] = []  # biases that were not there
        self._bias_path: str | None = None

    # ------------------------------------------------------------------------------------------- the two networks

    @contextmanager
    def smooth(self) -> Iterator[None]:
        """Within the block, the model is the smooth network."""
        refit = {parameter: parameter.data for parameter in self.originals}
        try:
            for parameter, original in self.originals.items():
                parameter.data = original
            yield
        finally:
            for parameter, data in refit.items():
                parameter.data = data

    @contextmanager
    def substituted(self, *more: str) -> Iterator[None]:
        """Within the block, the model is the network as substituted so far, the sites in `more` too."""
        self._gates(self.hard | set(more))
        try:
            yield
        finally:
            self._gates(set())

    def _gates(self, hard: set[str]) -> None:
        for name, site in self.sites.items():
            site.as_relu = name in hard

    def undo(self) -> None:
        self._gates(set())
        for parameter, original in self.originals.items():
            parameter.data = original
        self.originals.clear()
        self.hard.clear()
        for owner, leaf in self._added:
            setattr(owner, leaf, None)
        self._added.clear()
        if self._bias_path is not None:
            self._set_bias(self._bias_path, False)

    # -------------------------------------------------------------------------------------------------- the batches

    def take(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Keep the calibration set on disk: it is iterated once."""
        for batch in batches:
            self.store.put(f"batch-{self.count}", dict(batch))
            self.count += 1
            self.examples += batch_size(self.model, batch)

    def batch(self, index: int) -> dict[str, Any]:
        return self.store.get(f"batch-{index}")

    def forward(self, index: int) -> Callable[[], Any]:
        """The model's forward on a batch, the same each time even if the model draws random numbers."""
        batch = self.batch(index)
        extra: dict[str, Any] = {}
        if "use_cache" in _parameters(self.model) and "use_cache" not in batch:
            extra["use_cache"] = False  # a cache would carry state from call to call

        def run() -> Any:
            with torch.random.fork_rng(), warnings.catch_warnings():
                torch.manual_seed(0)
                try:
                    return call(self.model, {**batch, **extra})
                except FORWARD_ERRORS as error:
                    raise forward_failed(self.model, index, error) from error

        return run

    # ------------------------------------------------------------------------------------------ through a chain

    def independent(self, chain: Chain) -> bool:
        """Whether the blocks' other arguments are what they are whatever the hidden state: only it is carried along."""
        if len(chain.blocks) == 1:
            return True
        with self.substituted():
            smooth = capture(self.model, chain, self.forward(0))
        with self.substituted(*(site for sites in chain.sites for site in sites)):
            hard = capture(self.model, chain, self.forward(0))
        return all(
            _equal(without_hidden(first)[0], without_hidden(second)[0]) for first, second in zip(smooth, hard, strict=True)
        )

    def enter(self, chain: Chain) -> None:
        """Keep the arguments with which both networks call the chain's blocks, on every batch."""
        for index in range(self.count):
            self.store.discard(f"smooth-next-{index}")  # of the last block of another chain
            with self.smooth():
                self._keep_calls("smooth", index, chain)
            if not chain.pooled:
                with self.substituted():
                    self._keep_calls("hard", index, chain)

    def _keep_calls(self, network: str, index: int, chain: Chain) -> None:
        calls = capture(self.model, chain, self.forward(index))
        if len(calls) != len(chain.blocks) and not chain.pooled:
            raise CalibrationError(
                f"calibration batch {index}: {len(calls)} of {chain.blocks[0]} … {chain.blocks[-1]} ran, on batch 0 all "
                f"{len(chain.blocks)} did. Let every batch hold the same inputs"
            )
        if len(chain.blocks) > 1:
            stripped = [without_hidden(call) for call in calls]
            self.store.put(f"{network}-hidden-{index}", stripped[0][1])
            calls = [arguments for arguments, _ in stripped]
        self.store.put(f"{network}-calls-{index}", calls)

    def calls(self, network: str, index: int, chain: Chain, step: int) -> list[Arguments]:
        calls = self.store.get(f"{network}-calls-{index}")
        if len(chain.blocks) > 1:
            return [with_hidden(calls[step], self.store.get(f"{network}-hidden-{index}"))]
        return calls

    def keep_next(self, network: str, index: int, hidden: Tensor | None) -> None:
        """Keep what a block put out, for `advance`, which then need not run it again."""
        if hidden is not None:
            self.store.put(f"{network}-next-{index}", hidden)

    def advance(self, chain: Chain, step: int, module: nn.Module) -> None:
        """Let the output of a block be the hidden state of the next, in both networks."""
        for index in range(self.count):
            for network, context in (("smooth", self.smooth), ("hard", self.substituted)):
                if f"{network}-next-{index}" not in self.store:
                    (arguments,) = self.calls(network, index, chain, step)
                    with context():
                        self.keep_next(network, index, observe(module, arguments, ()).hidden)
                self.store.rename(f"{network}-next-{index}", f"{network}-hidden-{index}")

    # --------------------------------------------------------------------------------------------------- biases

    def give_biases(self, maps: Iterable[LinearMap]) -> str | None:
        """Give the maps a bias of zeros if a config attribute can; its path, or None with nothing changed."""
        lacking = {m.name.removesuffix("weight") + "bias": m for m in maps if m.bias is None and m.index is None}
        own = isinstance(self.model, PreTrainedModel)
        found = bias_attribute(self.model, set(lacking)) if lacking and own else None
        if found is None:
            return None
        path, lengths = found
        own_config(self.model)
        self._bias_path = path
        self._set_bias(path, True)
        for name, length in lengths.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(owner_name)
            like = next(owner.parameters())
            self._added.append((owner, leaf))
            bias = torch.zeros(length, dtype=like.dtype, device=like.device)
            owner.register_parameter(leaf, nn.Parameter(bias, requires_grad=like.requires_grad))
            if name in lacking:
                lacking[name].bias = getattr(owner, leaf)
        return path

    def _set_bias(self, path: str, value: bool) -> None:
        parent, _, leaf = path.rpartition(".")
        owner = get_attribute(self.model.config, parent) if parent else self.model.config
        put_attribute(self.model.config, path, value)
        for module in self.model.modules():  # T5's halves hold copies
            config = getattr(module, "config", None)
            if type(config) is type(owner):
                setattr(config, leaf, value)


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def _equal(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
