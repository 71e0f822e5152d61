"""Scripts in processes of their own, started from a folder that is not the repository's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import in_fork

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


SETTINGS = """
import json, os, sys
from pathlib import Path
import datasets.config, torch, transformers
from huggingface_hub import HfApi, constants
from transformers import dynamic_module_utils
assert sys.stdin.read() == ""
kept = [pair for holder in (constants, datasets.config) for pair in vars(holder).items()]
read = {name: str(value) for name, value in kept if isinstance(value, (str, bool, Path))}
read |= {"endpoint": HfApi().endpoint, "modules": dynamic_module_utils.HF_MODULES_CACHE, "arguments": sys.argv[1:]}
read |= {"verbosity": transformers.logging.get_verbosity(), "threads": torch.get_num_threads(), "folder": os.getcwd()}
print(json.dumps(read))
sys.exit("for a reason")
"""


def test_a_fork_is_as_a_process_of_its_own(tmp_path: Path) -> None:
    """Libraries know of its environment what they would know, had it started as Python does; it ends as that one does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_CACHE": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SETTINGS, "a b", "c"]
    fresh = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    forked = in_fork(SETTINGS, "a b", "c", cwd=tmp_path, env=env)
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)
    assert json.loads(forked.stdout)["HF_HUB_CACHE"] == str(tmp_path / "home" / "hub")
    assert (forked.returncode, forked.stderr) == (fresh.returncode, fresh.stderr) == (1, "for a reason\n")
