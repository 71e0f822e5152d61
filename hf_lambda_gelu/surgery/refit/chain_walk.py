"""A walk along a chain of blocks: both networks' hidden states before the block that it has come to, on every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._compat import pytree
from ...measurement.batches import CalibrationError
from ...reports import progress
from ...structure.linear_maps import LinearMap
from .blocks import Arguments, with_hidden, without_hidden
from .chains import Chain, capture
from .meeting_point import Meeting, Observed, find_meeting, main_tensor, observe
from .two_networks import Network, TwoNetworks


def is_independent(networks: TwoNetworks, chain: Chain) -> bool:
    """Whether the blocks' other arguments are what they are whatever the hidden state: only it is carried along."""
    if len(chain.blocks) == 1:
        return True
    with networks.substituted():
        smooth = capture(networks.model, chain, networks.forward(0))
    with networks.substituted(*(site for sites in chain.sites for site in sites)):
        hard = capture(networks.model, chain, networks.forward(0))
    return all(
        _equal(without_hidden(first)[0], without_hidden(second)[0]) for first, second in zip(smooth, hard, strict=True)
    )


class ChainWalk:
    """Goes from block to block. The states lie in the networks' store, so that memory holds one batch at a time."""

    def __init__(self, networks: TwoNetworks, chain: Chain) -> None:
        """Run both networks over the calibration set, and keep the arguments with which they call the chain's blocks."""
        self.networks, self.chain = networks, chain
        self._step = 0
        for index in progress(range(networks.count), "Running both networks"):
            networks.store.discard(_key(Network.SMOOTH, "next", index))  # of the last block of another chain
            with networks.smooth():
                self._keep_calls(Network.SMOOTH, index)
            if not chain.pooled:
                with networks.substituted():
                    self._keep_calls(Network.SUBSTITUTED, index)

    def _keep_calls(self, network: Network, index: int) -> None:
        blocks, store = self.chain.blocks, self.networks.store
        calls = capture(self.networks.model, self.chain, self.networks.forward(index))
        if len(calls) != len(blocks) and not self.chain.pooled:
            raise CalibrationError(
                f"calibration batch {index}: {len(calls)} of {blocks[0]} … {blocks[-1]} ran, on batch 0 all "
                f"{len(blocks)} did. Let every batch hold the same inputs"
            )
        if len(blocks) > 1:
            stripped = [without_hidden(call) for call in calls]
            store.put(_key(network, "hidden", index), stripped[0][1])
            calls = [arguments for arguments, _ in stripped]
        store.put(_key(network, "calls", index), calls)

    @property
    def block(self) -> torch.nn.Module:
        """The block that the walk has come to."""
        return self.networks.model.get_submodule(self.chain.blocks[self._step])

    def calls(self, network: Network, index: int) -> list[Arguments]:
        """The arguments with which a network calls the block on a batch: once, unless the block is pooled."""
        calls: list[Arguments] = self.networks.store.get(_key(network, "calls", index))
        if len(self.chain.blocks) > 1:
            return [with_hidden(calls[self._step], self.networks.store.get(_key(network, "hidden", index)))]
        return calls

    def observe(self, arguments: Arguments, maps: Sequence[LinearMap], meeting: Meeting | None = None) -> Observed:
        """Run the block, as the network that the model is now, and keep what concerns `maps`."""
        self.networks.check()
        return observe(self.block, arguments, maps, meeting)

    def find_meeting(self, linear: LinearMap) -> Meeting | None:
        """Where the output of the map has become part of the smooth network's residual stream."""
        with self.networks.smooth():
            return find_meeting(self.block, self.calls(Network.SMOOTH, 0)[0], linear)

    def keep_next(self, network: Network, index: int, hidden: Tensor | None) -> None:
        """Keep what the block put out, for `advance`, which then need not run it again."""
        if hidden is not None:
            self.networks.store.put(_key(network, "next", index), hidden)

    def advance(self) -> None:
        """Go to the next block: what this one puts out is the hidden state there, in both networks."""
        store = self.networks.store
        contexts = {Network.SMOOTH: self.networks.smooth, Network.SUBSTITUTED: self.networks.substituted}
        for index in range(self.networks.count):
            for network, context in contexts.items():
                if _key(network, "next", index) not in store:
                    (arguments,) = self.calls(network, index)
                    with context(), torch.no_grad():
                        self.keep_next(network, index, main_tensor(self.block(*arguments[0], **arguments[1])))
                store.rename(_key(network, "next", index), _key(network, "hidden", index))
        self._step += 1


def _key(network: Network, what: str, index: int) -> str:
    return f"{network.value}-{what}-{index}"


def _equal(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
