"""Refit weights of a model that FSDP2 has cut up: each process keeps its part of them.

Until the end they lie beside the parts of the smooth network, so that other processes can ask for either, and a failure
takes nothing away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ...structure.block_source import source_of
from ...structure.file_source import FileSource
from ...structure.shard_source import ShardSource
from ...structure.transaction import keep
from .refit_files import RefitFiles
from .sources import RefitWeights


class RefitShards(RefitWeights):
    """The refit weights of a model that FSDP2 has cut up: of each, this process's part, until the end beside the old one.

    Args:
        all_did: a meeting of the processes, named by what they did before it.
    """

    source: ShardSource

    def __init__(self, source: ShardSource, all_did: Callable[[str], object]) -> None:
        super().__init__(source)
        self._all_did = all_did

    def _let_rest(
        self,
        parameters: Iterable[nn.Parameter],
        smooth: Mapping[nn.Parameter, Tensor],
        originals: dict[nn.Parameter, Tensor],
    ) -> None:
        super()._let_rest(parameters, smooth, originals)
        self._all_did("the parts of the refit weights")  # before one of the processes asks for them

    def _put_away(self, parameter: nn.Parameter) -> None:
        if self.source.streams(parameter):
            parameter.data = self.source.cut(parameter)

    def commit(self, originals: Mapping[nn.Parameter, Tensor]) -> set[nn.Parameter]:
        cut_up = {parameter for parameter in originals if self.source.is_cut(parameter)}
        for parameter in cut_up:
            memory, part = self.source.memory(parameter), self.source.part(parameter)
            keep(memory)
            memory.copy_(part)
        return set(originals) - cut_up


def refit_weights(model: nn.Module, folder: Path, all_did: Callable[[str], object]) -> RefitWeights | None:
    """Where the model's refit weights go; None where all weights stay in memory.

    Args:
        folder: of the disk, for what has no place of its own there.
        all_did: as for `RefitShards`.
    """
    source = source_of(model)
    if isinstance(source, FileSource):
        return RefitFiles(source, source.folder or folder)
    return RefitShards(source, all_did) if isinstance(source, ShardSource) else None
