"""The refit of a checkpoint of any size: its model runs with one block of weights in memory, and its files are rewritten.

The model's weights are views of the checkpoint's files, so that the verb which works in memory does all of the work; the
source of its blocks reads them when a block is entered. What is refit lies in a folder beside the target until the end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import CONFIG_NAME

from .._compat import pytree
from ..structure.file_source import FileChanged, FileSource
from ..structure.loading import CheckpointError
from ..surgery.refit.report import Compensate
from ..surgery.report import SubstitutionReport
from ..surgery.substitution import relu_ize
from .disk_room import MAKE_ROOM, Room
from .folders import unfinished_folder
from .streamed_model import Streamed


def usable_device(device: str | torch.device) -> torch.device:
    """The device; ValueError if there is no such one here."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}): expected 'cpu', or 'cuda'") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: weights are streamed to 'cpu' or 'cuda' alone")
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


class Asked(NamedTuple):
    """What `relu_ize` is asked for, its calibration set aside, under its own names."""

    force: bool
    tolerance: float
    targets: Mapping[str, float] | None
    compensate: Compensate | None
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    hinges: int
    budget: float | None


@contextmanager
def refit_streamed(streamed: Streamed, calibration: Iterable[Any] | None, asked: Asked) -> Iterator[SubstitutionReport]:
    """Within the block, the model is a ReLU network, its changed weights in files; a killed process is gone on with.

    Raises:
        As `relu_ize`; CheckpointError for files that change meanwhile, no room, or other work that was left unfinished.
    """
    source = streamed.source
    with _file_errors(), unfinished_folder(streamed.files.target) as folder:
        source.folder = folder
        source.identity = _identity(streamed, asked)
        room = Room(streamed, refit=asked.compensate is not None)
        source.expect = room.check
        batches = None if calibration is None else _Hashed(calibration, source, room)
        with source.attached():
            report = relu_ize(streamed.model, calibration=batches, processes="one", **asked._asdict())
        streamed.check_unchanged()
        yield report
        streamed.check_unchanged()


@contextmanager
def _file_errors() -> Iterator[None]:
    """Within the block, a file that has changed and a disk that is full are CheckpointErrors that say what to do."""
    try:
        yield
    except FileChanged as error:
        raise CheckpointError(str(error)) from error
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
        if not full:
            raise
        raise CheckpointError(
            f"no room is left for hidden states in {tempfile.gettempdir()!r}, or for weights beside the new folder: "
            f"{error}. {MAKE_ROOM}"
        ) from error


def _identity(streamed: Streamed, asked: Asked) -> dict[str, str]:
    """Of the files, of what is asked for, and of what does it. The calibration set adds its own."""
    files = [(str(place.path.resolve()), place.state) for place in streamed.places]
    config = (streamed.files.folder / CONFIG_NAME).read_bytes()
    said = json.dumps([files, config.decode("utf-8", "replace")])
    return {
        "weight files": hashlib.sha256(said.encode()).hexdigest(),
        **{name: repr(value) for name, value in asked._asdict().items() if name != "compute_metrics"},
        "device": streamed.source.device.type,
        "version of torch": torch.__version__,
    }


class _Hashed:
    """A calibration set that adds what it holds to the identity of the work, once it has been read, and asks for room."""

    def __init__(self, batches: Iterable[Any], source: FileSource, room: Room) -> None:
        self._batches, self._source, self._room = batches, source, room

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # what has no length raises, as asked for

    def __iter__(self) -> Iterator[Any]:
        digest = hashlib.sha256()
        for batch in self._batches:
            for leaf in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
                if isinstance(leaf, Tensor):
                    plain = leaf.detach().to("cpu").contiguous().reshape(-1)
                    digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
                    digest.update(plain.view(torch.uint8).numpy().data)
                else:
                    digest.update(repr(leaf).encode())
            main = batch.get("input_ids") if isinstance(batch, Mapping) else None
            self._room.tokens += main.numel() if isinstance(main, Tensor) else 0
            yield batch
        self._source.identity["calibration data"] = digest.hexdigest()
        if self._room.refit:
            self._room.check({})
