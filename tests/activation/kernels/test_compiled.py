"""Libraries that are damaged or somebody else's are not loaded, and odd compilers say what is wrong."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

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
    for text, message in (
        ("exit 0", "reported no error and wrote nothing"),
        ("printf '\\351t\\351' >&2; exit 1", "failed: .t"),
    ):
        monkeypatch.setenv("CXX", compiler(tmp_path, text))
        reason = compiled.Library(source, {}).unavailable()
        assert reason is not None
        assert "the C++ kernel could not be built" in reason
        with pytest.raises(RuntimeError, match=message):
            compiled.Library(source, {}).loaded()
    assert list((tmp_path / "built").rglob("*.so")) == []
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(RuntimeError, match="looked for no-such-compiler -O3"):
        compiled.Library(source, {}).loaded()
