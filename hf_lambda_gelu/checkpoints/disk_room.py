"""Whether the disks have room for a refit in files, asked before it begins."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..structure.block_source import blocks_of
from ..structure.loading import CheckpointError
from .streamed_model import Streamed

MAKE_ROOM = "Make room, let TMPDIR name a folder on a larger disk, or pass fewer calibration batches"


class Room:
    """Asks the disks for room: for hidden states, where the main input is text, and for weights.

    Attributes:
        refit: whether maps are refit, for which hidden states are kept.
        tokens: of the calibration set, as far as it was read.
    """

    def __init__(self, streamed: Streamed, refit: bool) -> None:
        self._streamed, self.refit, self.tokens = streamed, refit, 0
        # then what maps get is kept, and one network's states for whoever goes on after a kill
        self._shifts = refit and streamed.model.dtype in (torch.float32, torch.float64)

    def check(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> None:
        """CheckpointError if there is too little.

        Args:
            shapes: those of the weights that will be changed; none as long as they are not known.
        """
        temporary = Path(tempfile.gettempdir())
        target = next(parent for parent in self._streamed.files.target.parents if parent.is_dir())
        self._streamed.check_unchanged()
        states, changed, files = self._states(shapes), self._changed(shapes), self._files(shapes)
        needed = {temporary: states, target: changed + files}
        if target.stat().st_dev == temporary.stat().st_dev:  # states are gone by the time that files are written
            needed = {target: changed + max(states, files)}
        for folder, size in needed.items():
            free = shutil.disk_usage(folder).free
            if size > free:
                hidden = f"hidden states of {self.tokens:,} tokens and " if self.refit else ""
                raise CheckpointError(
                    f"{hidden}new weight files need up to {size:,} bytes in {str(folder)!r}, where {free:,} are free. "
                    f"{MAKE_ROOM}"
                )

    def _states(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> int:
        """Of both networks before and after a block, and what the block's map gets."""
        if not self.refit:
            return 0
        model = self._streamed.model
        matrices = [shapes.get(p, p.shape) for block in blocks_of(model) for p in block.parameters() if p.dim() == 2]
        features = max((size for shape in matrices for size in shape), default=0) if self._shifts else 0
        return self.tokens * model.dtype.itemsize * (4 * self._hidden + features)

    def _changed(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> int:
        """Of what was changed, and of states for after a kill, twice, as far as a killed process did not leave it."""
        weights = sum(_size(p, shape) for p, shape in shapes.items())
        states = 2 * self.tokens * self._streamed.model.dtype.itemsize * self._hidden if self._shifts else 0
        folder = self._streamed.source.folder
        there = 0 if folder is None else sum(path.stat().st_size for path in folder.iterdir())
        return max(0, weights + states - there)

    def _files(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> int:
        """Of the new weight files."""
        streamed = self._streamed
        files = sum(place.path.stat().st_size for place in streamed.places)
        files += sum(_size(p, shape) - p.nbytes for p, shape in shapes.items() if p in streamed.names)
        return files + sum(_size(p, shapes.get(p, p.shape)) for p in streamed.new())

    @property
    def _hidden(self) -> int:
        return int(getattr(self._streamed.model.config.get_text_config(), "hidden_size", 0))


def _size(parameter: nn.Parameter, shape: Sequence[int]) -> int:
    """Of a parameter of that shape, in bytes."""
    return math.prod(shape) * parameter.itemsize
