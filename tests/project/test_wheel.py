"""A built wheel, installed without the source, has every room, the C++ file and the templates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_lambda_gelu"

# In an interpreter that sees the wheel and the installed libraries: imports every module, and reads what is no module.
_LOOK = """
import importlib, importlib.util, json, pkgutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import hf_lambda_gelu as hlg
root = Path(hlg.__file__).parent
names = [module.name for module in pkgutil.walk_packages([str(root)], "hf_lambda_gelu.")]
without_triton = importlib.util.find_spec("triton") is None
modules = [importlib.import_module(n) for n in names if not (without_triton and n.endswith(".cuda_programs"))]
from hf_lambda_gelu.activation.kernels import cpu
templates = root / "checkpoints" / "templates"
print(json.dumps({
    "root": str(root),
    "elsewhere": [m.__name__ for m in modules if not Path(m.__file__).is_relative_to(root)],
    "modules": sorted(["hf_lambda_gelu", *names]),
    "kernel": cpu._LIBRARY._source.read_text(encoding="utf-8"),
    "templates": {path.name: path.read_text(encoding="utf-8") for path in templates.iterdir() if path.is_file()},
}))
"""


def run(*command: object, cwd: Path) -> str:
    """What the command prints, run outside the repository and without its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def source_files() -> set[str]:
    """The package's files in the repository, relative to it."""
    paths = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, so that no build folder is left in the repository, with what is installed and no network."""
    work = tmp_path_factory.mktemp("wheel")
    copy = work / "source"
    shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", work, copy, cwd=work)
    (built,) = work.glob("*.whl")
    return built


def test_has_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == source_files()


def test_works_without_the_source(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", target, wheel)
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *install, cwd=tmp_path)
    found = json.loads(run(sys.executable, "-I", "-c", _LOOK, target, cwd=tmp_path))
    assert found["root"] == str(target / "hf_lambda_gelu")
    assert found["elsewhere"] == []
    sources = [path for path in source_files() if path.endswith(".py") and "/templates/" not in path]
    assert found["modules"] == sorted(
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources
    )
    assert found["kernel"] == (PACKAGE / "activation" / "kernels" / "cpu.cpp").read_text(encoding="utf-8")
    templates = {path.name: path for path in (PACKAGE / "checkpoints" / "templates").iterdir() if path.is_file()}
    assert found["templates"] == {name: path.read_text(encoding="utf-8") for name, path in templates.items()}
    assert {"card.md", "modeling_lambda_gelu.py"} <= set(templates)
