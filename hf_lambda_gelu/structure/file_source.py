"""Weights that stay in the files of a checkpoint while their block does not run.

What stands in for a parameter is a view of a file that is mapped into memory, which takes up none until somebody looks at
it. So a weight has its value at any time, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._compat import without_torch_function
from .block_source import BlockSource, blocks_of

_READERS = 4  # threads
# a module outside of the blocks (embeddings, head) rests as blocks do if its weights are as large; in bytes
_LARGE = 32 << 20


class FileChanged(OSError):
    """A file that weights come from is not what it was. An error of files, which no forward raises by itself."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie: file and offset, and what the file was when that was found out."""

    path: Path
    offset: int
    state: tuple[int, ...]


class FileSource(BlockSource):
    """Brings the weights of a model's blocks in from files.

    Attributes:
        places: address of a resting tensor → where its bytes lie.
        changed: parameter → the file with its bytes, of those that a verb has changed.
        folder: where weights that a verb has changed are written, and what is done there; None: a scratch folder.
        identity: of the work, by parts, so that one that was broken off is known again, and what is other in another one.
        expect: is told, before the work begins, the weights that will be changed and the shapes that they will have.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self.places: dict[int, tuple[Tensor, Place]] = {}
        self.changed: dict[nn.Parameter, Path] = {}
        self.folder: Path | None = None
        self.identity: dict[str, str] = {}
        self.expect: Callable[[Mapping[nn.Parameter, tuple[int, ...]]], None] = lambda shapes: None

    def rests(self, data: Tensor) -> bool:
        """Whether this is a view of a file."""
        return data.device.type == "cpu" and data.numel() > 0 and data.data_ptr() in self.places

    def add(self, data: Tensor, place: Place) -> None:
        """Let this view of a file be known as one."""
        self.places[data.data_ptr()] = (data, place)

    def load(self, resting: Tensor) -> Tensor:
        """A copy of what rests, on the device.

        Raises:
            FileChanged: the file is not what it was.
        """
        return self.load_all([resting])[0]

    def load_all(self, resting: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what rests, on the device: for an accelerator, read by several threads into memory that it can reach."""
        cuda = self.device.type == "cuda"
        with torch.no_grad(), without_torch_function():
            places = [self.places[view.data_ptr()][1] for view in resting]
            made = [torch.empty(v.shape, dtype=v.dtype, device="cpu", pin_memory=cuda) for v in resting]
            buffers = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in made]
            if cuda and len(made) > 1:
                with ThreadPoolExecutor(_READERS) as pool:
                    list(pool.map(self._read, places, buffers))
            else:
                for place, buffer in zip(places, buffers, strict=True):
                    self._read(place, buffer)
            return [tensor.to(self.device, non_blocking=cuda) for tensor in made]

    def _read(self, place: Place, buffer: memoryview) -> None:
        check_same(place)
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise changed(place.path)
                done += count

    def prepare(self) -> None:
        """Onto the device with what does not come and go: weights outside of blocks, buffers, and λ."""
        self.blocks = {block: list(block.parameters()) for block in blocks_of(self.model)}
        inside = {p for weights in self.blocks.values() for p in weights}
        outside = [m for m in self.model.modules() if any(p not in inside for p in m.parameters(recurse=False))]
        for module in outside:
            own = [p for p in module.parameters(recurse=False) if p not in inside]
            if self.device.type == "cpu" and sum(p.nbytes for p in own) >= _LARGE:
                self.blocks[module] = own
                continue
            for parameter in own:
                parameter.data = self.load(parameter.data) if self.rests(parameter.data) else parameter.data.to(self.device)
        for parameter in inside:
            if not self.rests(parameter.data):
                parameter.data = parameter.data.to(self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)


def file_state(path: Path) -> tuple[int, ...]:
    """By which a file is known again: device, inode, size and time of the last change in ns."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_same(place: Place) -> None:
    """FileChanged if the file has changed, or another one has taken its place."""
    try:
        now = file_state(place.path)
    except OSError as error:
        raise changed(place.path) from error
    if now != place.state:
        raise changed(place.path)


def changed(path: Path) -> FileChanged:
    """The error to raise where a file has changed."""
    return FileChanged(
        f"{str(path)!r} has changed since the work began: is somebody writing it, or another checkpoint into its folder? "
        "Wait for that, and start again"
    )


def mapped(path: Path) -> Tensor:
    """The bytes of a file, which are read when they are looked at; what is written into them stays in memory."""
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
