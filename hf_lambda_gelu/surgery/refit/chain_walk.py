"""A walk along a chain of blocks: both networks' hidden states before the block that it has come to, on every batch.

A block is run apart from the model's forward only where that gives what the forward gave: what it put out there is
sampled, and runs of the smooth network's block are compared with it (`ReplayError`). What fails is run whole. The forward
runs the blocks on two batches where what they get does not depend on hidden states, else on each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..._compat import pytree
from ...reports import progress
from ...structure.linear_maps import LinearMap
from .capture import Call, Sample, capture
from .chains import Chain
from .meeting_point import Meeting, Observed, find_meeting
from .ridge import Correction
from .runs import ReplayError, Run
from .shift import Shift, features_of
from .skipping import LookedAtError, can_be_skipped, capture_skipping
from .two_networks import Network, TwoNetworks

logger = logging.get_logger(__name__)


class DependentError(Exception):
    """More than the hidden state is carried from block to block, or not all run on every batch. Never leaves the package."""


class ChainWalk:
    """Goes from block to block. The states lie in the networks' store, so that memory holds one batch at a time.

    Attributes:
        pooled: whether the block runs several times in a forward pass: it is seen on the smooth network's states alone.
        aligned: whether both networks call the blocks as often, and on all rows, so that rows can be compared.
    """

    def __init__(self, networks: TwoNetworks, chain: Chain) -> None:
        """Run both networks over the calibration set, and keep the calls of the chain's blocks.

        Raises:
            DependentError: a chain of several blocks that has to be split.
        """
        self.networks, self.chain = networks, chain
        self.pooled, self.aligned = chain.pooled, True
        self._step = 0
        self._shift: Shift | None = None  # of the substituted network's output, as it was before the last refit
        self._samples: dict[tuple[int, int], list[Sample | None]] = {}  # (batch, step) → of each call, smooth
        if not self.whole:
            self._capture()
            self.aligned = not networks.team.any(not self.aligned, "whether both networks get the same rows")

    @property
    def whole(self) -> bool:
        """Whether the model itself is the only block."""
        return self.chain.blocks == [""]

    @property
    def block(self) -> torch.nn.Module:
        """The block that the walk has come to."""
        return self.networks.model.get_submodule(self.chain.blocks[self._step])

    # ------------------------------------------------------------------------------------------------- what is kept

    def _capture(self) -> None:
        networks, team, own = self.networks, self.networks.team, range(self.networks.batches.count)
        for index in own:
            networks.store.discard(_key(Network.SMOOTH, "next", index))  # of the last block of another chain
        if len(self.chain.blocks) > 1 and not self.pooled:
            try:
                with team.together(LookedAtError, DependentError):
                    self._capture_skipping()
                return
            except LookedAtError as error:
                logger.info(f"{self.chain.blocks[0]} … {self.chain.blocks[-1]} are run to see what they get ({error})")
        with team.together(DependentError):
            for index in progress(own, "Running both networks"):
                with networks.smooth():
                    count = self._keep_calls(Network.SMOOTH, index)
                self.pooled = self.pooled or count > len(self.chain.blocks)
        self.pooled = team.any(self.pooled, "whether a block runs several times")
        if not self.pooled:
            with team.together(DependentError):
                for index in own:
                    self._keep_substituted(index)
                    self.aligned = self.aligned and self._is_aligned(index)

    def _capture_skipping(self) -> None:
        """Find what the blocks get without running them, but for the smooth network's on the first batch and the last.

        These show that what is found so is what the blocks get, and what they put out is what they give when they are run
        again. The last batch comes last: what the model leaves behind there is what blocks that remember find.

        Raises:
            LookedAtError: the blocks have to be run on every batch.
        """
        networks, last = self.networks, self.networks.batches.count - 1
        if last < 0:  # an empty share
            return
        with networks.smooth():
            whole, known = self._run_all(0)
        for index in progress(range(last + 1), "Running both networks"):
            forward = partial(capture_skipping, networks.model, self.chain, towers=networks.towers, samples=known)
            with networks.smooth():
                calls = forward(networks.forward(index))
            if index == 0:
                _check_others(calls, whole)
            hidden = calls[0].hidden
            assert hidden is not None
            self._keep_samples(index, [Sample(hidden.shape, hidden.dtype, hidden.device)] * len(calls))
            self._put(Network.SMOOTH, index, calls)
            if networks.hard or networks.originals:
                with networks.substituted():
                    calls = forward(networks.forward(index))
            self._put(Network.SUBSTITUTED, index, calls)
            self.aligned = self.aligned and self._is_aligned(index)
        self._keep_samples(0, known)
        with networks.smooth():
            whole, known = self._run_all(last)
        found = networks.store.get(_key(Network.SMOOTH, "calls", last))
        _check_others([Call(*parts) for parts in found], whole)
        self._keep_samples(last, known)

    def _run_all(self, index: int) -> tuple[list[Call], list[Sample | None]]:
        """The calls of a chain of several blocks, run on a batch, and samples of what they put out.

        Raises:
            LookedAtError: a block cannot be skipped.
        """
        networks = self.networks
        names, calls, samples = capture(networks.model, self.chain, networks.forward(index), networks.towers, outputs=True)
        if names != self.chain.blocks:
            raise DependentError
        if not can_be_skipped(calls, samples):
            raise LookedAtError("what a block puts out is not like its hidden state")
        return calls, samples

    def _keep_samples(self, index: int, samples: list[Sample | None]) -> None:
        self._samples.update({(index, step): [sample] for step, sample in enumerate(samples)})

    def _put(self, network: Network, index: int, calls: list[Call]) -> None:
        """Keep the calls of a chain of several blocks, of which the first one's hidden state counts."""
        self.networks.store.put(_key(network, "hidden", index), calls[0].hidden)
        self.networks.store.put(_key(network, "calls", index), _others(calls))

    def _keep_substituted(self, index: int) -> None:
        """What its first block gets does not depend on the chain's own sites; nor may whatever else the others get."""
        networks, sites = self.networks, [site for several in self.chain.sites for site in several]
        if len(self.chain.blocks) > 1:
            with networks.substituted(*sites):
                self._keep_calls(Network.SUBSTITUTED, index)
            hard = networks.store.get(_key(Network.SUBSTITUTED, "calls", index))
            if _equal(hard, networks.store.get(_key(Network.SMOOTH, "calls", index))):
                return
        with networks.substituted():
            self._keep_calls(Network.SUBSTITUTED, index)
        if len(self.chain.blocks) > 1 and not _equal(hard, networks.store.get(_key(Network.SUBSTITUTED, "calls", index))):
            raise DependentError

    def _keep_calls(self, network: Network, index: int) -> int:
        """Keep the calls of the blocks by a network, and samples of what the smooth one's put out; how many there were."""
        networks, store, smooth = self.networks, self.networks.store, network is Network.SMOOTH
        names, calls, samples = capture(networks.model, self.chain, networks.forward(index), networks.towers, smooth)
        if len(self.chain.blocks) > 1 and names != self.chain.blocks:
            raise DependentError
        if len(self.chain.blocks) > 1:
            self._put(network, index, calls)
        else:
            store.put(_key(network, "calls", index), [call.parts for call in calls])
        if smooth and len(self.chain.blocks) > 1:
            self._keep_samples(index, samples)
        elif smooth:
            self._samples[index, 0] = samples
        return len(calls)

    def _is_aligned(self, index: int) -> bool:
        smooth, hard = (self._calls(network, index) for network in (Network.SMOOTH, Network.SUBSTITUTED))
        size = self.networks.batches.sizes[index]
        return len(smooth) == len(hard) and all(
            a.hidden is not None and b.hidden is not None and a.hidden.shape == b.hidden.shape and a.has_all_rows(size)
            for a, b in zip(smooth, hard, strict=True)
        )

    def _calls(self, network: Network, index: int) -> list[Call]:
        """The calls of the block by a network on a batch: one, unless the block is pooled or not always run."""
        store = self.networks.store
        calls = [Call(*parts) for parts in store.get(_key(network, "calls", index))]
        if len(self.chain.blocks) == 1:
            return calls
        return [calls[self._step].with_hidden(store.get(_key(network, "hidden", index)))]

    # -------------------------------------------------------------------------------------------------- what is run

    def runs(self, network: Network, index: int) -> list[Run]:
        """The runs of the block by a network on a batch; of the whole model, where that is the block."""
        networks, block = self.networks, self.block
        if self.whole:
            return [Run(block, networks.forward(index), networks.towers)]
        samples = self._samples[index, self._step] if network is Network.SMOOTH else []
        size = networks.batches.sizes[index]
        return [
            Run(
                block,
                partial(call.run, block),
                networks.towers,
                partial(networks.towers.following, size, base=call.tower(size), chosen=call.chosen, root=block),
                samples[place] if samples else None,
            )
            for place, call in enumerate(self._calls(network, index))
        ]

    def find_meeting(self, linear: LinearMap) -> Meeting | None:
        """Where the output of the map has become part of the smooth network's residual stream.

        Raises:
            ReplayError: the block gives something else than in the model's forward.
        """
        team, batches = self.networks.team, self.networks.batches
        with self.networks.smooth():
            single = (index for index in range(batches.count) if len(self.runs(Network.SMOOTH, index)) == 1)
            own = next(single, None)
            number = None if own is None else batches.deal.number(team.rank, own)
            numbers = [n for n in team.gathered(number, "where a block runs once") if n is not None]
            if not numbers:
                return None
            rank, found = batches.deal.order[min(numbers)][0], None
            with team.together(ReplayError):
                if team.rank == rank:
                    found = find_meeting(self.runs(Network.SMOOTH, own or 0)[0], linear)
            return team.given(rank, found, f"where {linear.label} meets the stream")

    def prove(self) -> None:
        """Run the smooth network's block on the first batch that reaches it; ReplayError if that gives something else."""
        with self.networks.smooth(), self.networks.team.together(ReplayError):
            for index in range(0 if self.whole else self.networks.batches.count):
                runs = self.runs(Network.SMOOTH, index)
                for run in runs:
                    run()
                if runs:
                    return

    def keep_next(self, network: Network, index: int, hidden: Tensor | None) -> None:
        """Keep what the block put out, for `advance`, which then need not run it again."""
        if hidden is not None:
            self.networks.store.put(_key(network, "next", index), hidden)

    def forget_given(self) -> None:
        """A site is refit: what the block of the substituted network puts out will be another."""
        self._shift = None
        for index in range(self.networks.batches.count):
            self.networks.store.discard(_key(Network.SUBSTITUTED, "next", index))

    def keep_given(self, index: int, given: Observed, linear: LinearMap, meeting: Meeting) -> None:
        """Keep what the block put out before its map is refit, where `advance` can do with that."""
        features = features_of(given, linear.label, meeting) if self._step + 1 < len(self.chain.blocks) else None
        if features is not None:
            self.keep_next(Network.SUBSTITUTED, index, given.hidden)
            self.networks.store.put(_key(Network.SUBSTITUTED, "features", index), features)

    def correct(self, correction: Correction, meeting: Meeting | None) -> None:
        """The map before the meeting point was corrected."""
        self._shift = None if meeting is None else Shift(correction, meeting.scale)

    def advance(self) -> list[str]:
        """Go to the next block: what this one puts out is the hidden state there, in both networks.

        Returns:
            The names of the substituted network's states in the store, if some were shifted: a run rounds otherwise.
        """
        with self.networks.team.together(ReplayError):
            shifted = self._step_on(range(self.networks.batches.count))
        self._step += 1
        return shifted

    def _step_on(self, own: range) -> list[str]:
        store, any_shifted = self.networks.store, False
        shifts = all(_key(Network.SUBSTITUTED, "next", index) in store for index in own)
        for index in own:
            self._run_on(Network.SMOOTH, index)
            kept, shifted = _key(Network.SUBSTITUTED, "next", index), None
            if shifts and self._shift is not None:
                shifted = self._shift.applied(store.get(kept), store.get(_key(Network.SUBSTITUTED, "features", index)))
            store.discard(kept)
            if shifted is not None and index > 0:
                any_shifted = True
                self.keep_next(Network.SUBSTITUTED, index, shifted)
            self._run_on(Network.SUBSTITUTED, index)
            if shifted is not None and index == 0:  # the first batch proves it
                ran = Sample.of(store.get(kept))
                shifts = ran is not None and ran.matches(Sample.of(shifted))
            for network in Network:
                store.rename(_key(network, "next", index), _key(network, "hidden", index))
        return [_key(Network.SUBSTITUTED, "hidden", index) for index in own] if any_shifted else []

    def _run_on(self, network: Network, index: int) -> None:
        """Keep what the block puts out, unless that was kept before."""
        if _key(network, "next", index) not in self.networks.store:
            with self.networks.smooth() if network is Network.SMOOTH else self.networks.substituted():
                (run,) = self.runs(network, index)
                self.keep_next(network, index, run())


def _key(network: Network, what: str, index: int) -> str:
    return f"{network.value}-{what}-{index}"


def _others(calls: list[Call]) -> list[Any]:
    """What blocks are called with besides the hidden state."""
    return [call.without_hidden().parts for call in calls]


def _check_others(calls: list[Call], others: list[Call]) -> None:
    if not _equal(_others(calls), _others(others)):
        raise LookedAtError("what blocks get besides hidden states depends on these")


def _equal(first: Any, second: Any) -> bool:
    ones, others = (pytree.tree_leaves(value) for value in (first, second))
    if len(ones) != len(others):
        return False
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if isinstance(a, Tensor)]
    return all(isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
