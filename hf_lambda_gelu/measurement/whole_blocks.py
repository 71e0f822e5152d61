"""A model that FSDP2 has cut up, run by each process on its own batches: one block of weights is whole at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..structure.block_source import source_of
from ..structure.shard_source import ShardSource
from ..structure.sharding import is_cut_by_fsdp2
from .team import Team


@contextmanager
def whole_blocks(model: nn.Module, team: Team) -> Iterator[None]:
    """Within the block, each process of the team runs the model as often as it likes; a model that is whole stays as it is.

    `check_by_blocks` has seen the model, and the block is within `team.whole()`.
    """
    if not is_cut_by_fsdp2(model) or source_of(model) is not None:
        yield
        return
    source = ShardSource(model, team.ask if team.size > 1 else None)
    team.same([(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()], "which weights there are")
    before = team.answer
    if team.size > 1:
        team.answer = source.answer
    try:
        with source.attached():
            yield
            team.all_did("all that needs whole weights")  # or somebody would ask in vain
    finally:
        if team.size > 1:
            team.answer = before
