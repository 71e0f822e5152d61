"""`whole_folder` and scratch folders: nothing lost and nothing half, whoever is killed and whatever lies there."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_lambda_gelu.checkpoints import folders
from hf_lambda_gelu.checkpoints.folders import check_new, whole_folder
from hf_lambda_gelu.structure.claims import Claim
from hf_lambda_gelu.structure.scratch import scratch_folder
from hf_lambda_gelu.structure.transaction import transaction
from scripts.tools import tables
from scripts.tools.writers import RESULTS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked and killed")


def write(folder: Path, text: str, overwrite: bool = False) -> None:
    """A folder with two files, of which one is a saved model's."""
    with whole_folder(folder, overwrite) as temporary:
        (temporary / "config.json").write_text(text)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "more").write_text(text)


def read(folder: Path) -> list[str]:
    """The text of both."""
    return [(folder / name).read_text() for name in ("config.json", "inner/more")]


def killed(work: Callable[[], None]) -> None:
    """A process that does the work, and kills itself in it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die() -> None:
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def entries(folder: Path) -> set[str]:
    """Names in it."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["at once", "by two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the system puts a folder in the place of another, and as one does that cannot do so at once."""
    if request.param != "at once":
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    return request.param


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """The old folder is there; what was written lies beside it, for its owner alone, until the next call."""
    folder = tmp_path / "model"
    write(folder, "old")

    def work() -> None:
        with whole_folder(folder, overwrite=True) as temporary:
            (temporary / "config.json").write_text("half")
            die()

    killed(work)
    assert read(folder) == ["old", "old"]
    assert entries(tmp_path) == {"model", ".model.hf_lambda_gelu-partial"}
    assert stat.S_IMODE((tmp_path / ".model.hf_lambda_gelu-partial").stat().st_mode) == 0o700
    write(folder, "new", overwrite=True)
    assert read(folder) == ["new", "new"]
    assert entries(tmp_path) == {"model"}


@pytest.mark.parametrize("step", ["rename", "flush_names"])
def test_killed_while_it_swaps(step: str, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each rename: the next call finds the old folder or the new one, and takes it for what it is."""
    folder, renames = tmp_path / "model", 2 if step == "rename" and swap != "at once" else 1
    for before in range(renames):
        folder = tmp_path / f"model{before}"
        write(folder, "old")

        def work(folder: Path = folder, before: int = before) -> None:
            rename, calls = Path.rename, [0]

            def stopping(path: Path, target: Path) -> Path:
                if calls[0] == before:
                    die()
                calls[0] += 1
                return rename(path, target)

            if step == "rename":
                monkeypatch.setattr(Path, "rename", stopping)
            monkeypatch.setattr(folders, "flush_names", lambda *_: die())
            write(folder, "new", overwrite=True)

        killed(work)
        with pytest.raises(ValueError, match="is not empty"):
            check_new(folder)
        assert read(folder) in (["old"] * 2, ["new"] * 2)
        write(folder, "newer", overwrite=True)
        assert read(folder) == ["newer", "newer"]
        assert entries(folder) == {"config.json", "inner"}
    assert not [name for name in entries(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("before", ["nothing", "empty", "a model"])
@pytest.mark.parametrize("place", ["flush_names", "leave"])
def test_stopped_after_the_swap(before: str, place: str, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb raises, so the disk is as it was: what was in the new folder's place is back, and nothing else is left."""
    folder = tmp_path / "model"
    if before == "empty":
        folder.mkdir()
    elif before == "a model":
        write(folder, "old")
    there = entries(tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((folders, "flush_names", stop) if place == "flush_names" else (Claim, "leave", stop_once(stop))))
        with pytest.raises(KeyboardInterrupt):
            write(folder, "new", overwrite=True)
    assert entries(tmp_path) == there
    assert before != "a model" or read(folder) == ["old", "old"]
    assert before != "empty" or entries(folder) == set()
    write(folder, "new", overwrite=True)
    assert read(folder) == ["new", "new"]


def stop_once(stop: Callable[..., None]) -> Callable[..., None]:
    """`Claim.leave`, stopped the first time that it is called."""
    leave, calls = Claim.leave, [0]

    def leave_or_stop(self: Claim, keep: bool = False) -> None:
        calls[0] += 1
        if calls[0] == 1:
            stop()
        leave(self, keep)

    return leave_or_stop


def test_two_write_one_folder(tmp_path: Path) -> None:
    """The second is refused before its work, in another process and in another thread; then it may."""
    folder = tmp_path / "model"
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with whole_folder(folder) as temporary:
            (temporary / "config.json").write_text("first")
            (temporary / "inner").mkdir()
            (temporary / "inner" / "more").write_text("first")
            os.write(ready[1], b".")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    refused = []

    def second() -> None:
        try:
            write(folder, "second")
        except ValueError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    os.write(done[1], b".")
    os.waitpid(child, 0)
    assert refused == [f"another process is making {str(folder)!r} just now: choose another folder, or wait for it"]
    assert read(folder) == ["first", "first"]
    write(folder, "second", overwrite=True)
    assert read(folder) == ["second", "second"]
    assert entries(tmp_path) == {"model"}


def test_a_link_and_a_mode_stay(swap: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    (tmp_path / "disk" / "model").mkdir(mode=0o750)
    (tmp_path / "disk" / "model").chmod(0o2750)
    for text in ("one", "two"):  # in the place of an empty folder, and of a full one
        write(link, text, overwrite=True)
        assert link.is_symlink()
        assert read(tmp_path / "disk" / "model") == [text, text]
        assert stat.S_IMODE((tmp_path / "disk" / "model").stat().st_mode) == 0o2750
    assert entries(tmp_path / "disk") == {"model"}


def test_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be replaced, or whose loss would be more than a model's: each by its name, and nothing is touched."""
    (tmp_path / "project" / "inner").mkdir(parents=True)
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "project" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused = {
        tmp_path / "project": "holds the current folder",
        tmp_path / "project" / "inner": "is the current folder",
        tmp_path / "nowhere": "is a link that leads nowhere",
        tmp_path / "home": "is your home folder",
        tmp_path / "notes": "holds no config.json, so it is no saved model",
        Path("/proc"): "is a mount point",
    }
    for folder, reason in refused.items():
        if folder.exists() or folder.is_symlink():
            with pytest.raises(ValueError, match=reason):
                check_new(folder, overwrite=True)
            with pytest.raises(ValueError, match=reason):
                write(folder, "new", overwrite=True)
    assert entries(tmp_path) == {"project", "notes", "nowhere", "home"}
    assert entries(tmp_path / "notes") == {"thesis.txt"}


def test_what_lies_in_the_way_of_the_work(tmp_path: Path) -> None:
    """A file, or a link, under the name of the unfinished folder: not removed, not written through."""
    (tmp_path / "elsewhere").mkdir()
    for make in (lambda path: path.write_text("mine"), lambda path: path.symlink_to(tmp_path / "elsewhere")):
        partial = tmp_path / ".model.hf_lambda_gelu-partial"
        make(partial)
        with pytest.raises(ValueError, match=r"cannot write into .*what lies there is no folder"):
            write(tmp_path / "model", "new")
        assert os.path.lexists(partial)
        partial.unlink()
    assert entries(tmp_path / "elsewhere") == set()


def test_folders_made_on_the_way_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a" / "b" / "model"):
        raise RuntimeError
    assert entries(tmp_path) == set()


def test_on_the_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and folder but a hard link of another's is flushed first, and the name of the folder at the end."""
    (tmp_path / "source").write_text("weights")
    flushed: list[tuple[int, bool]] = []
    sync = os.fsync

    def noted(opened: int) -> None:
        flushed.append((os.fstat(opened).st_ino, (tmp_path / "model").exists()))
        sync(opened)

    monkeypatch.setattr(os, "fsync", noted)
    with whole_folder(tmp_path / "model") as temporary:
        (temporary / "config.json").write_text("{}")
        os.link(tmp_path / "source", temporary / "weights")
    model = tmp_path / "model"
    assert flushed == [(path.stat().st_ino, False) for path in (model / "config.json", model)] + [
        (tmp_path.stat().st_ino, True)
    ]


def test_scratch_of_a_killed_process_goes_and_kept_and_used_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a refit are a user's texts: the next one removes them. Not what an error names, nor what lives."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def work() -> None:
        with scratch_folder() as folder:
            (folder / "texts").write_text("private")
            die()

    killed(work)
    assert len(entries(tmp_path)) == 1
    with contextlib.suppress(RuntimeError), scratch_folder(kept_on=(RuntimeError,)) as kept:
        assert entries(tmp_path) == {kept.name}
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700
        raise RuntimeError
    with scratch_folder() as used, scratch_folder() as other:
        assert entries(tmp_path) == {kept.name, used.name, other.name}
    assert entries(tmp_path) == {kept.name}


def test_a_claim_that_was_stopped_takes_nothing_of_another(tmp_path: Path) -> None:
    """Undone before it was taken, it leaves the folder to the process that has it."""
    one, other = Claim(tmp_path / "claimed"), Claim(tmp_path / "claimed")
    one.take()
    with pytest.raises(BlockingIOError):
        other.take(wait=0.0)
    other.remove()
    assert (tmp_path / "claimed").is_dir()

    @transaction
    def nested(model: object) -> None:
        write(tmp_path / "model", "new")
        raise KeyError  # after the folder is in place: it stays, as a verb's own work

    with pytest.raises(KeyError):
        nested(None)
    assert entries(tmp_path) == {"claimed", "model"}
    one.remove()
    assert entries(tmp_path) == {"model"}


def test_the_table_of_writers_that_were_disturbed() -> None:
    """Each writer by each disturbance: SIGKILLs, two at once, full disks, no permission. None lost, none half, none left."""
    rows = tables.read(RESULTS)
    assert len({(row["writer"], row["disturbed by"]) for row in rows}) == len(rows) == 45
    assert {(row["half"], row["left"]) for row in rows} == {("0", "0")}
    for row in rows:
        assert int(row["tries"]) == int(row["as before"]) + int(row["complete"]) > 0
    killed = [row for row in rows if row["disturbed by"] == "SIGKILL"]
    assert sum(int(row["tries"]) for row in killed) >= 200
    assert all(int(row["as before"]) for row in killed)
    assert sum(int(row["complete"]) for row in killed) >= 50


@pytest.mark.parametrize("call", ["stat", "chmod"])
def test_stopped_while_it_is_claimed(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the lock and the end of `take`: `remove` knows that it is this process which has the folder."""
    claim = Claim(tmp_path / "claimed")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, stop)
        with pytest.raises(KeyboardInterrupt):
            claim.take()
    assert claim.folder.is_dir()
    claim.remove()
    assert not claim.folder.exists()
