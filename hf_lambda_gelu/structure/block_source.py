"""Weights that are in memory only while their block runs: where they come from, and the hooks that bring them.

Between its block's runs a parameter rests: its data is a view of a file that is mapped into memory, which takes up none
until somebody looks at it. So a weight has its value at any time, on the CPU. When a block is entered its weights are read
from their files, onto the device, and when it is left they rest again. All of it is derived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import without_torch_function

_SOURCE = "_block_source"
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


@dataclass
class BlockSource:
    """Brings the weights of a model's blocks in and lets them go.

    Attributes:
        device: where the model runs.
        blocks: the modules whose weights come and go, with these.
        places: address of a resting tensor → where its bytes lie.
        changed: parameter → the file with its bytes, of those that a verb has changed.
        folder: where weights that a verb has changed are written, and what is done there; None: a scratch folder.
        identity: of the work, by parts, so that one that was broken off is known again, and what is other in another one.
        expect: is told, before the work begins, the weights that will be changed and the shapes that they will have.
        generation: goes up whenever weights come or go, and with them their addresses in memory.
    """

    model: nn.Module
    device: torch.device
    places: dict[int, tuple[Tensor, Place]] = field(default_factory=dict)
    changed: dict[nn.Parameter, Path] = field(default_factory=dict)
    folder: Path | None = None
    identity: dict[str, str] = field(default_factory=dict)
    expect: Callable[[Mapping[nn.Parameter, tuple[int, ...]]], None] = lambda shapes: None
    generation: int = 0
    blocks: dict[nn.Module, list[nn.Parameter]] = field(default_factory=dict)
    _streamed: set[nn.Parameter] = field(default_factory=set)
    _entered: dict[nn.Module, list[list[tuple[nn.Parameter, Tensor]]]] = field(default_factory=dict)
    _skipped: frozenset[nn.Module] = frozenset()

    # ------------------------------------------------------------------------------------------------- what rests

    def rests(self, data: Tensor) -> bool:
        """Whether this is a view of a file."""
        return data.device.type == "cpu" and data.numel() > 0 and data.data_ptr() in self.places

    def streams(self, parameter: nn.Parameter) -> bool:
        """Whether it comes and goes with a block; what lies outside of blocks stays."""
        return parameter in self._streamed

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

    # ------------------------------------------------------------------------------------------------ what comes in

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model runs: weights come and go with its blocks, all else is on the device."""
        handles = []
        try:
            vars(self.model)[_SOURCE] = self
            self.blocks = {block: list(block.parameters()) for block in blocks_of(self.model)}
            self._bring_in({p for weights in self.blocks.values() for p in weights})
            self._streamed = {p for weights in self.blocks.values() for p in weights if self.rests(p.data)}
            for block in self.blocks:
                handles.append(block.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(block.register_forward_hook(self._leave, prepend=True, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, stack in self._entered.items():
                while stack:
                    self._leave(block)
            vars(self.model).pop(_SOURCE, None)

    def _bring_in(self, inside: set[nn.Parameter]) -> None:
        """Onto the device with what does not come and go: weights outside of blocks, buffers, and λ."""
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

    def _enter(self, block: nn.Module, *given: Any) -> None:
        with torch.no_grad(), without_torch_function():
            wanted = () if block in self._skipped else self.blocks[block]
            brought = [(p, p.data) for p in wanted if self.rests(p.data)]
            for (parameter, _), data in zip(brought, self.load_all([rest for _, rest in brought]), strict=True):
                parameter.data = data
            self._entered.setdefault(block, []).append(brought)
            self.generation += bool(brought)

    def _leave(self, block: nn.Module, *given: Any) -> None:
        with torch.no_grad(), without_torch_function():
            stack = self._entered.get(block)
            brought = stack.pop() if stack else []
            for parameter, resting in brought:
                parameter.data = resting
            self.generation += bool(brought)

    @contextmanager
    def holding(self, parameters: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Within the block, these weights stay on the device: {parameter: where it rests} of those that rested before."""
        held = {p: p.data for p in parameters if self.rests(p.data)}
        try:
            for parameter, data in zip(held, self.load_all(list(held.values())), strict=True):
                parameter.data = data
            self.generation += 1
            yield held
        finally:
            for parameter, resting in held.items():
                if not self.rests(parameter.data):
                    parameter.data = resting
            self.generation += 1


def source_of(model: nn.Module) -> BlockSource | None:
    """What brings the weights of this model's blocks; None if all of them are in memory."""
    found: BlockSource | None = vars(model).get(_SOURCE)
    return found


@contextmanager
def skipping(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, these blocks are called and do not run: nobody reads their weights."""
    source = source_of(model)
    if source is None:
        yield
        return
    before = source._skipped
    try:
        source._skipped = before | frozenset(blocks)
        yield
    finally:
        source._skipped = before


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs: its first parameter's device, or that which weights are brought to."""
    source = source_of(model)
    if source is not None:
        return source.device
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that lists of modules hold and that can be called: a network's layers."""
    found: dict[nn.Module, None] = {}
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        for child in module.children():
            listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and module is not model
            container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if listed and not container and any(True for _ in child.parameters()):
                found[child] = None
            else:
                stack.append(child)
    return list(found)


# -------------------------------------------------------------------------------------------------------------- files


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
