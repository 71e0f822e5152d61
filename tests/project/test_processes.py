"""Scripts in processes of their own, started from a folder that is not the repository's."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.tools.processes import run_module


def test_paths_stay_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is found without any help, and a relative path that it gets is relative to where the user is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    in_the_way = tmp_path / "cache" / "segment"
    in_the_way.mkdir(parents=True)
    done = run_module("scripts.tools.assets", "segment", "--cache", "cache", capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {in_the_way} is in the way")


def test_what_was_importable_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH, of the process or as it is given, comes after the repository."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.chdir(tmp_path)
    (own / "own_module.py").write_text("import scripts.tools.tables, sys; print(sys.argv[1:])")
    monkeypatch.setenv("PYTHONPATH", str(own))
    assert run_module("own_module", "a b", "c", capture_output=True).stdout == "['a b', 'c']\n"
    monkeypatch.delenv("PYTHONPATH")
    env = {"PYTHONPATH": str(own)}
    assert run_module("own_module", capture_output=True, env=env).stdout == "[]\n"
