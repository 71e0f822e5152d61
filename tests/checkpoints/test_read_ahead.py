"""The next block's weights, read by a thread while one is worked on: as for an accelerator, here on the CPU."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.folders import digests, same_tensors, stored
from support.processes import killed
from support.refit_folders import refit, save
from torch.multiprocessing.reductions import StorageWeakRef

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure import file_source
from hf_lambda_gelu.structure.file_source import FileSource
from hf_lambda_gelu.structure.read_ahead import NAME, ReadAhead
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.refit_files import RefitFiles


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, and what is made of it where nothing is read ahead."""
    root = tmp_path_factory.mktemp("whole")
    save(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setattr(ReadAhead, "start", lambda *_: pytest.fail("something was read ahead for a CPU"))
        refit(root)
    return root


@pytest.fixture(autouse=True)
def ahead(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(file_source, "_AHEAD_FOR", ("cpu",))
    shutil.copytree(whole / "src", tmp_path / "src")
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


class Reads:
    """Who has read what: the thread that reads ahead, or the one that calls.

    Attributes:
        ahead, called: the places that were read, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead: list[Any] = []
        self.called: list[Any] = []
        read = FileSource._read

        def watched(source: FileSource, place: Any, buffer: memoryview) -> None:
            (self.ahead if in_thread() else self.called).append(place)
            read(source, place, buffer)

        monkeypatch.setattr(FileSource, "_read", watched)


def in_thread() -> bool:
    return threading.current_thread().name.startswith(NAME)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let who takes wait until all is read, so that it does not depend on chance what is there."""
    take = ReadAhead.take

    def waits(self: ReadAhead[Any], numbers: Any) -> list[int]:
        if self._running is not None:
            self._running.result()
        return take(self, numbers)

    monkeypatch.setattr(ReadAhead, "take", waits)


def test_same_bits(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read ahead is what is wanted: but for what comes first or was guessed wrong, nothing is left to read."""
    patient(monkeypatch)
    reads = Reads(monkeypatch)
    refit(tmp_path)
    same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))
    assert len(reads.ahead) > 2 * len(reads.called)


def test_whatever_the_thread_has_done(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes reads what is missing, be it all or a part."""
    take, counts = ReadAhead.take, [0]

    def some(self: ReadAhead[Any], numbers: Any) -> list[int]:
        done = take(self, numbers)
        counts[0] += 1
        return done[: counts[0] % 4]

    monkeypatch.setattr(ReadAhead, "take", some)
    refit(tmp_path)
    same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))


def test_one_block_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is brought in, the memory of what came before is free, and so it is of what was read ahead of that."""
    patient(monkeypatch)
    taken: list[StorageWeakRef] = []
    made: list[StorageWeakRef] = []
    alive: list[int] = []
    most: list[int] = []
    load_all, buffer = FileSource.load_all, FileSource._buffer

    def watched(source: FileSource, resting: Any) -> Any:
        if resting:
            alive.append(sum(not storage.expired() for storage in taken))
        loaded = load_all(source, resting)
        if any(source.streams(p) for p in source.model.parameters()):
            taken.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in loaded)
        return loaded

    def counted(source: FileSource, resting: Any) -> Any:
        found = buffer(source, resting)
        made.append(StorageWeakRef(found.untyped_storage()))
        most.append(sum(not storage.expired() for storage in made))
        return found

    monkeypatch.setattr(FileSource, "load_all", watched)
    monkeypatch.setattr(FileSource, "_buffer", counted)
    refit(tmp_path)
    outside = 2 + 1  # embeddings and head, and the last norm
    assert max(alive) == 0
    assert 9 + 9 <= max(most) <= 9 + 9 + outside


def test_an_error_of_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what it could not read is wanted, the caller raises it, and nothing is left."""
    patient(monkeypatch)
    before = digests(tmp_path)
    read, reads = FileSource._read, list[None]()

    def failing(source: FileSource, place: Any, buffer: memoryview) -> None:
        if in_thread():
            reads.append(None)
            if len(reads) > 40:
                raise OSError(5, "Input/output error")
        read(source, place, buffer)

    monkeypatch.setattr(FileSource, "_read", failing)
    with pytest.raises(OSError, match="Input/output error"):
        refit(tmp_path)
    assert digests(tmp_path) == before


def test_a_file_that_changes_once_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block is solved the next one's weights are there, and their file gets others: noticed before they are used."""
    reads, decide, start = Reads(monkeypatch), engine.decide, ReadAhead.start
    readers: list[ReadAhead[Any]] = []
    solved: list[None] = []

    def started(self: ReadAhead[Any], wanted: Any) -> None:
        readers.append(self)
        start(self, wanted)

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        solved.append(None)
        if len(solved) == 1:
            running = readers[-1]._running
            assert running is not None
            assert len(running.result()[0]) == 9
            os.utime(reads.ahead[-1].path, ns=(1, 1))
        return decide(*args, **kwargs)

    monkeypatch.setattr(ReadAhead, "start", started)
    monkeypatch.setattr(engine, "decide", meanwhile)
    with pytest.raises(hlg.CheckpointError, match="has changed since the work began"):
        refit(tmp_path)
    assert len(solved) == 1
    assert not (tmp_path / "dst").exists()


def test_a_kill(whole: Path, tmp_path: Path) -> None:
    killed(RefitFiles, "note", 2, lambda: refit(tmp_path))
    assert not (tmp_path / "dst").exists()
    refit(tmp_path)
    same_tensors(stored(tmp_path / "dst"), stored(whole / "dst"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_one_at_a_time() -> None:
    """What was begun is dropped when something else is, the thread stops where it is, what it raised is told if wanted."""
    order: list[int] = []
    at, go_on = threading.Event(), threading.Event()

    def read(place: int, buffer: memoryview) -> None:
        order.append(place)
        if place == 1:
            at.set()
            go_on.wait(10)
        if place == 7:
            raise ValueError("seven")
        buffer[:] = bytes([place] * len(buffer))

    reader: ReadAhead[int] = ReadAhead(read)
    assert reader.take([1]) == []
    kept = [bytearray(2) for _ in range(8)]
    reader.start([(10 * n, n, memoryview(kept[n])) for n in (1, 2, 3)])
    at.wait(10)
    go_on.set()
    assert set(reader.take([10, 20, 30, 99])) <= {10, 20, 30}
    count = len(order)
    reader.start([(n, n, memoryview(kept[n])) for n in (4, 7, 5)])
    reader._running.result()  # type: ignore[union-attr]
    assert order[count:] == [4, 7]
    assert reader.take([4]) == [4]
    reader.start([(n, n, memoryview(kept[n])) for n in (7, 5)])
    reader._running.result()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="seven"):
        reader.take([7])
    assert kept[4] == bytes([4, 4])
    reader.close()
    reader.close()
