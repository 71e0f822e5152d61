"""The refit of a checkpoint of any size: its model runs with one block of weights in memory, and its files are rewritten.

The model's weights are views of the checkpoint's files, so that the verb which works in memory does all of the work; the
source of its blocks reads them when a block is entered. What is refit lies in a folder beside the target until the end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME

from .._compat import pytree
from ..activation.module import hardness_sites
from ..activation.older_checkpoints import NAME, OLDER
from ..structure.block_source import BlockSource, FileChanged, Place, blocks_of, check_same, file_state
from ..structure.config_probe import hard_coded_sites
from ..structure.loading import CheckpointError, load_without_reading
from ..surgery.conversion import convert
from ..surgery.report import SubstitutionReport
from ..surgery.substitution import relu_ize
from .folders import unfinished_folder
from .on_disk_files import Source
from .shards import Replacement, mapped_tensors

_MAKE_ROOM = "Make room, let TMPDIR name a folder on a larger disk, or pass fewer calibration batches"


class Streamed:
    """The model of a checkpoint whose weights stay in its files.

    Attributes:
        model: its parameters are views of the files.
        source: brings the weights of a block in.
        names: parameter → what the checkpoint calls it.
        hardness: the names of the checkpoint's λ.
    """

    def __init__(self, files: Source, device: torch.device) -> None:
        self.files = files
        states = {shard.path: file_state(shard.path) for shard in files.shards}
        found = {shard.path: mapped_tensors(shard.path) for shard in files.shards}
        self.places = [Place(path, 0, state) for path, state in states.items()]
        tensors = {name: view for views in found.values() for name, (view, _) in views.items()}
        if len(tensors) < sum(map(len, found.values())):
            raise CheckpointError(f"{str(files.folder)!r} holds a tensor in two of its files: fetch it again")
        self.hardness = {name for name in tensors if name.rpartition(".")[2] in (NAME, OLDER)}
        if files.config.__dict__.get("quantization_config") is not None:
            raise ValueError(
                f"{str(files.folder)!r} is quantised and cannot be refit: substitute first, then quantise the ReLU model"
            )
        self.model = load_without_reading(files.folder, files.config, files.cls, tensors)
        self.source = BlockSource(self.model, device)
        called = {view.data_ptr(): name for name, view in tensors.items() if view.numel()}
        self.names = {p: called[p.data_ptr()] for p in self.model.parameters() if _is_view(p, called, tensors)}
        for name, p in self.model.named_parameters():  # a tied bias is padded, to the length that it has
            if p not in self.names and name in tensors and p.dim() == 1 and torch.equal(p, tensors[name]):
                self.names[p] = name
        self._check_views()
        for path, views in found.items():
            for name, (view, offset) in views.items():
                if name not in self.hardness and view.numel():
                    self.source.add(view, Place(path, offset, states[path]))
        if not hardness_sites(self.model):
            convert(self.model)
        free = hard_coded_sites(self.model)
        if free:
            raise CheckpointError(
                f"no config attribute governs {free[0]}, so that λ has to go into the weights: load the model and call "
                "relu_ize"
            )

    def _check_views(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter not in self.names and name.rpartition(".")[2] != NAME and parameter.numel():
                raise CheckpointError(
                    f"the checkpoint holds {name} in another form or dtype than {type(self.model).__name__} has it (merged "
                    "from several tensors, as experts are, or cast), so that it cannot be refit in its files: load the "
                    "model and call relu_ize"
                )

    def check_unchanged(self) -> None:
        """FileChanged if a weight file is not what it was."""
        for place in self.places:
            check_same(place)

    def changed(self) -> dict[str, Replacement]:
        """{what the checkpoint calls it: its new bytes} of the weights that were refit."""
        changed = self.source.changed
        return {self.names[p]: Replacement(path, tuple(p.shape)) for p, path in changed.items() if p in self.names}

    def new(self) -> dict[nn.Parameter, str]:
        """The biases that maps were given, with the model's names."""
        known = {*self.names, *(site.unclipped_hardness for site in hardness_sites(self.model).values())}
        return {p: name for name, p in self.model.named_parameters() if p not in known}

    def added(self) -> dict[str, Tensor]:
        """The biases that maps were given, by the model's names."""
        return {name: p.detach().to("cpu") for p, name in self.new().items()}


def _is_view(parameter: nn.Parameter, called: Mapping[int, str], tensors: Mapping[str, Tensor]) -> bool:
    name = called.get(parameter.data_ptr())
    if name is None:
        return False
    view = tensors[name]
    return (view.shape, view.dtype, view.stride()) == (parameter.shape, parameter.dtype, parameter.stride())


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


@contextmanager
def refit_streamed(
    streamed: Streamed, calibration: Iterable[Any] | None, options: Mapping[str, Any]
) -> Iterator[SubstitutionReport]:
    """Within the block, the model is a ReLU network, its changed weights in files; it goes on with what a killed process did.

    Args:
        options: the other ones of `relu_ize`, by name.

    Raises:
        As `relu_ize`; CheckpointError for files that change meanwhile, no room, or other work that was left unfinished.
    """
    source = streamed.source
    with _file_errors(), unfinished_folder(streamed.files.target) as folder:
        source.folder = folder
        source.identity = _identity(streamed, options)
        room = _Room(streamed, refit=options["compensate"] is not None)
        source.expect = room.check
        batches = None if calibration is None else _Hashed(calibration, source, room)
        with source.attached():
            report = relu_ize(streamed.model, calibration=batches, **options)
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
            f"{error}. {_MAKE_ROOM}"
        ) from error


def _identity(streamed: Streamed, options: Mapping[str, Any]) -> dict[str, str]:
    """Of the files, of what is asked for, and of what does it. The calibration set adds its own."""
    files = [(str(place.path.resolve()), place.state) for place in streamed.places]
    config = (streamed.files.folder / CONFIG_NAME).read_bytes()
    said = json.dumps([files, config.decode("utf-8", "replace")])
    asked = {name: repr(value) for name, value in options.items() if name != "compute_metrics"}
    return {
        "weight files": hashlib.sha256(said.encode()).hexdigest(),
        **asked,
        "device": streamed.source.device.type,
        "version of torch": torch.__version__,
    }


class _Hashed:
    """A calibration set that adds what it holds to the identity of the work, once it has been read, and asks for room."""

    def __init__(self, batches: Iterable[Any], source: BlockSource, room: _Room) -> None:
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


class _Room:
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
        states, weights = self._states(shapes), self._weights(shapes)
        needed = {temporary: states, target: weights}
        if target.stat().st_dev == temporary.stat().st_dev:
            needed = {target: states + weights}
        for folder, size in needed.items():
            free = shutil.disk_usage(folder).free
            if size > free:
                hidden = f"hidden states of {self.tokens:,} tokens and " if self.refit else ""
                raise CheckpointError(
                    f"{hidden}new weight files need up to {size:,} bytes in {str(folder)!r}, where {free:,} are free. "
                    f"{_MAKE_ROOM}"
                )

    def _states(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> int:
        """Of both networks before and after a block, and what the block's map gets."""
        if not self.refit:
            return 0
        model = self._streamed.model
        matrices = [shapes.get(p, p.shape) for block in blocks_of(model) for p in block.parameters() if p.dim() == 2]
        features = max((size for shape in matrices for size in shape), default=0) if self._shifts else 0
        return self.tokens * model.dtype.itemsize * (4 * self._hidden + features)

    def _weights(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> int:
        """Of the new weight files, of what was changed until these are made, and of states for after a kill, twice."""
        streamed = self._streamed
        sizes = {p: math.prod(shape) * p.itemsize for p, shape in shapes.items()}
        files = sum(place.path.stat().st_size for place in streamed.places)
        files += sum(size - p.nbytes for p, size in sizes.items() if p in streamed.names)
        files += sum(sizes.get(p, p.nbytes) for p in streamed.new())
        folder = streamed.source.folder
        done = 0 if folder is None else sum(path.stat().st_size for path in folder.iterdir())  # by a killed process
        states = 2 * self.tokens * streamed.model.dtype.itemsize * self._hidden if self._shifts else 0
        return files + max(0, sum(sizes.values()) + states - done)

    @property
    def _hidden(self) -> int:
        return int(getattr(self._streamed.model.config.get_text_config(), "hidden_size", 0))
