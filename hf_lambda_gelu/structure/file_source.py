"""Weights that stay in the files of a checkpoint while their block does not run.

What stands in for a parameter is a view of a file that is mapped into memory, which takes up none until somebody looks at
it. So a weight has its value at any time, on the CPU.

For an accelerator the block that will be wanted next is read while one is worked on: the one that came after it before, as
blocks run in the same order again and again. On a CPU reading takes next to no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._compat import without_torch_function
from .block_source import BlockSource, blocks_of
from .read_ahead import ReadAhead

_READERS = 4  # threads
_AHEAD_FOR = ("cuda",)  # devices for which the next block is read ahead
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
        self._ahead: ReadAhead[Place] = ReadAhead(self._read)
        self._buffers: dict[int, Tensor] = {}  # address of a resting tensor → what is read ahead of it
        # of what comes in together, the first one → all; and → the first one of what came in next
        self._together: dict[nn.Parameter, list[nn.Parameter]] = {}
        self._next: dict[nn.Parameter, nn.Parameter] = {}
        self._last: nn.Parameter | None = None

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
        """Copies of what rests, on the device: for an accelerator, by several threads into memory that it can reach.

        What was read ahead is taken from there.
        """
        if not resting:
            return []
        cuda = self.device.type == "cuda"
        with torch.no_grad(), without_torch_function():
            there = self._read_ahead(resting)
            found = [there.pop(view.data_ptr(), None) for view in resting]
            made = [self._buffer(view) if t is None else t for t, view in zip(found, resting, strict=True)]
            missing = [index for index, tensor in enumerate(found) if tensor is None]
            places = [self.places[resting[index].data_ptr()][1] for index in missing]
            buffers = [_bytes_of(made[index]) for index in missing]
            if cuda and len(missing) > 1:
                with ThreadPoolExecutor(_READERS) as pool:
                    list(pool.map(self._read, places, buffers))
            else:
                for place, buffer in zip(places, buffers, strict=True):
                    self._read(place, buffer)
            return [tensor.to(self.device, non_blocking=cuda) for tensor in made]

    def came_in(self, parameters: Sequence[nn.Parameter]) -> None:
        """Learn what comes after what, and begin to read what will come next; it stays in the CPU's memory."""
        if not parameters or self.device.type not in _AHEAD_FOR:
            return
        first = parameters[0]
        self._together[first] = list(parameters)
        if self._last is not None:
            self._next[self._last] = first
        self._last = first
        coming = self._next.get(first, first)
        views = [p.data for p in self._together[coming] if self.rests(p.data)] if coming is not first else []
        if views:
            self._buffers = {view.data_ptr(): self._buffer(view) for view in views}
            self._ahead.start([(a, self.places[a][1], _bytes_of(buffer)) for a, buffer in self._buffers.items()])

    def _read_ahead(self, resting: Sequence[Tensor]) -> dict[int, Tensor]:
        """What of these was read ahead, by address; nothing else is kept of it. Its files are still what they were."""
        done = self._ahead.take([view.data_ptr() for view in resting])
        there = {address: self._buffers[address] for address in done}
        self._buffers = {}
        for address in there:
            check_same(self.places[address][1])
        return there

    def _buffer(self, resting: Tensor) -> Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(resting.shape, dtype=resting.dtype, device="cpu", pin_memory=pinned)

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

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model runs: weights come and go with its blocks, all else is on the device."""
        try:
            with super().attached():
                yield
        finally:
            self._ahead.close()
            self._buffers = {}

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


def _bytes_of(tensor: Tensor) -> memoryview:
    found: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return found


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
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)  # type: ignore[arg-type]
