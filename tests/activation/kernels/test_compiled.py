"""Libraries that are damaged or somebody else's are not loaded, and odd compilers say what is wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_lambda_gelu.activation.kernels import compiled

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(compiled, "_HEADERS", tmp_path)
    (tmp_path / "answer.cpp").write_text(SOURCE)
    return tmp_path / "answer.cpp"


def answer(source: Path) -> int:
    """What the library says, as a new process would build or find it."""
    return int(compiled.Library(source, {"answer": (0, 0, 0)}, ctypes.c_int).loaded().answer())


def compiler(folder: Path, text: str) -> str:
    """A program that is called as a compiler is."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("damage", ["half", "empty", "another", "writable", "a link"])
def test_a_library_that_is_not_what_was_built(source: Path, tmp_path: Path, damage: str) -> None:
    """Built anew, where loading half of one would end the process."""
    built = compiled._build(source)
    whole, folder = built.read_bytes(), built.parent
    if damage == "writable":
        built.chmod(0o777)
    elif damage == "a link":
        built.rename(tmp_path / "elsewhere.so")
        built.symlink_to(tmp_path / "elsewhere.so")
    else:
        built.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "another": whole + b"x"}[damage])
    assert answer(source) == 42
    assert not built.is_symlink()
    assert built.read_bytes() == whole
    assert [path.name for path in folder.iterdir()] == [built.name]


def test_a_folder_that_others_may_write_into(source: Path, tmp_path: Path) -> None:
    """An own one is closed to them; one that they could put another in the place of, or that is a link, is not used."""
    kept = tmp_path / "built" / "hf_lambda_gelu"
    kept.mkdir(parents=True)
    kept.chmod(0o775)
    assert compiled.folder() == kept
    assert kept.stat().st_mode & 0o777 == 0o700
    (tmp_path / "built").chmod(0o777)
    assert compiled.folder() != kept
    (tmp_path / "built").chmod(0o1777)
    assert compiled.folder() == kept
    kept.rename(tmp_path / "real")
    kept.symlink_to(tmp_path / "real")
    assert compiled.folder() != kept


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone gives files away")
def test_a_folder_or_a_library_of_another_user(source: Path, tmp_path: Path) -> None:
    built = compiled._build(source)
    os.chown(built, 65534, -1)
    assert not compiled._is_whole(built)
    os.chown(built.parent, 65534, -1)
    assert compiled.folder() != built.parent


def test_compilers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options in CXX are passed on; one that writes nothing, or says it in no encoding, is named and leaves nothing."""
    monkeypatch.setenv("CXX", "g++ -DUNUSED='1 2'")
    assert answer(source) == 42
    for built in (tmp_path / "built").rglob("*.so"):
        built.unlink()
    last = "for last; do :; done; "  # the file to write
    for text, message in (
        ("exit 0", "reported no error and wrote nothing"),
        ("printf '\\351t\\351' >&2; exit 1", "failed: .t"),
        ("exit 3", "failed: code 3, and it said nothing"),
        ("kill -9 $$", "was ended by signal 9: it said nothing"),
        (last + 'echo half > "$last"; kill -15 $$', "was ended by signal 15"),
        (last + 'echo words > "$last"', "file too short"),
        (last + 'g++ "$@"; truncate -s 4096 "$last"', "dies: is the disk full"),
        ('g++ -Danswer=other "$@"', "what it wrote lacks answer"),
        ("cat", "wrote nothing"),  # which does not wait for an input
    ):
        monkeypatch.setenv("CXX", compiler(tmp_path, text))
        reason = compiled.Library(source, {"answer": (0, 0, 0)}).unavailable()
        assert reason is not None
        assert "the C++ kernel could not be built" in reason
        with pytest.raises(RuntimeError, match=message):
            compiled.Library(source, {"answer": (0, 0, 0)}).loaded()
        assert list((tmp_path / "built").rglob("*.so")) == []  # so that the next one is built anew
    monkeypatch.setenv("CXX", "g++ '-O2")
    with pytest.raises(RuntimeError, match="No closing quotation"):
        compiled.Library(source, {}).loaded()
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(RuntimeError, match="looked for no-such-compiler -O3"):
        compiled.Library(source, {}).loaded()


# A process of its own that builds; importing torch and transformers would take longer than all else.
BUILD = """
import importlib.util, sys, types
from pathlib import Path
sys.modules["torch"] = types.SimpleNamespace(
    backends=types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: "DEFAULT"))
)
spec = importlib.util.spec_from_file_location("compiled", sys.argv[1])
compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)
compiled._HEADERS = Path(sys.argv[2]).parent
print("ready", flush=True)
sys.stdin.readline()
library = compiled.Library(Path(sys.argv[2]), {"answer": (0, 0, 0)}, compiled.ctypes.c_int)
print(library.loaded().answer(), flush=True)
"""


def started(source: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, compiled.__file__, str(source)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_four_processes_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cold cache, all compile at the same time; each gets a whole library, and one is kept. A fifth compiles none."""
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo >> "{tmp_path}/runs"; sleep 0.5; exec g++ "$@"'))
    processes = [started(source) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 4
    assert len((tmp_path / "runs").read_text().splitlines()) == 4  # none found another's
    kept = list((tmp_path / "built" / "hf_lambda_gelu").iterdir())
    assert [path.suffix for path in kept] == [".so"]
    assert started(source).communicate("\n")[0] == "ready\n42\n"
    assert len((tmp_path / "runs").read_text().splitlines()) == 4


def test_a_process_that_is_killed_as_it_compiles(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next builds anew, and removes what was left once nobody can be at work on it."""
    monkeypatch.setenv("CXX", compiler(tmp_path, 'for last; do :; done; echo half > "$last"; kill -9 $PPID; sleep 5'))
    process = started(source)
    assert process.communicate("\n")[0] == "ready\n"
    assert process.returncode == -9
    left = list((tmp_path / "built" / "hf_lambda_gelu").iterdir())
    assert len(left) == 1
    monkeypatch.setenv("CXX", "g++")
    assert answer(source) == 42
    assert left[0].exists()  # it might be just at work
    os.utime(left[0], (0, 0))
    monkeypatch.setenv("CXX", "g++ -O1")
    assert answer(source) == 42
    assert not left[0].exists()


def test_a_cache_without_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is loaded all the same; what is not is built elsewhere, for this process."""
    there = compiled._build(source)
    monkeypatch.setattr(compiled.shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    assert compiled._build(source) == there
    monkeypatch.setenv("CXX", "g++ -O1")
    assert compiled._build(source).parent != there.parent
    assert answer(source) == 42
    assert list(there.parent.iterdir()) == [there]
    monkeypatch.undo()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    monkeypatch.chdir(tmp_path)
    assert compiled.folder().is_absolute()
    assert not (tmp_path / "~").exists()
