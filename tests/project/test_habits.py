"""What keeps the project in order: workflows and hooks name commands that exist, oldest versions are the declared ones."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.tools.oldest import bounds

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PACKAGE = ROOT / "hf_lambda_gelu"
# what makes a tensor on torch's default device where none is named
MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tensor"}
MAKERS |= {"rand", "randint", "randn", "randperm"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def made(lines: list[str]) -> set[str]:
    """The targets of the `make` commands among the lines, and of the Makefile's own recipes none."""
    words = [
        word for line in lines for part in line.split("&&") if part.split()[:1] == ["make"] for word in part.split()[1:]
    ]
    return {word for word in words if "=" not in word}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows(path: Path) -> None:
    """Valid, with the least rights, and every command is a make target that there is."""
    workflow = loaded(path)
    assert workflow["permissions"] == {"contents": "read"}
    lines = []
    for job in workflow["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        runs = [step["run"] for step in job["steps"] if "run" in step]
        lines += [row["run"] if "matrix.run" in run else run for run in runs for row in rows]
    assert made(lines)
    assert made(lines) <= TARGETS


def test_matrix() -> None:
    """Every minor version of Python since the declared one, the oldest and the newest versions; lint and docs."""
    jobs = loaded(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    rows = jobs["test"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows if row["run"] == "make test"} == {"3.10", "3.11", "3.12", "3.13"}
    assert {row["run"] for row in rows} >= {"make test-oldest", "make test CONSTRAINTS=/dev/null"}
    assert {"lint", "docs"} < set(jobs)
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_hooks_are_what_make_lint_runs() -> None:
    (repository,) = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {" ".join(hook["entry"].split()[:2]).removeprefix(".venv/bin/") for hook in repository["hooks"]}
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    ran = {" ".join(line.removeprefix("$(BIN)/").split()[:2]) for line in recipe[1].split("\n\t") for line in [line.strip()]}
    assert {line.split()[0] for line in ran} <= {hook.split()[0] for hook in hooks}


def test_make_targets_are_explained() -> None:
    """`make help` names every target but those that are steps of others."""
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = set(re.findall(r"^make ([a-z-]+)", shown.stdout, re.MULTILINE))
    assert named | {"help", "assets", "clean"} == TARGETS


@pytest.mark.parametrize(
    "name", ["site", "runs", "dist", ".venv", ".venv-oldest", ".venv-latest", ".mypy_cache", "a.egg-info"]
)
def test_what_make_makes_is_ignored(name: str) -> None:
    assert subprocess.run(["git", "check-ignore", "-q", f"{name}/x"], cwd=ROOT, check=False).returncode == 0


def project(*dependencies: str, **extras: list[str]) -> dict[str, Any]:
    return {"project": {"name": "mine", "dependencies": list(dependencies), "optional-dependencies": extras}}


def test_oldest_versions() -> None:
    declared = project(
        "torch>=2.6,<3", "b[x]>=1.0 ; python_version >= '3'", test=["mine[plots]", "c>=0.1"], plots=["d>=3,!=3.1"]
    )
    assert bounds(declared) == {"torch": "2.6", "b": "1.0", "c": "0.1", "d": "3"}
    assert bounds(project("a>=1; sys_platform == 'none'")) == {}


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        (["a"], "'a' has no lower bound; write a>=VERSION"),
        (["a<2"], "no lower bound"),
        (["a>=1", "a>=2"], "two lower bounds, 1, 2"),
    ],
)
def test_no_oldest_version(dependencies: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounds(project(*dependencies))


def test_new_tensors_name_their_device() -> None:
    """By default they lie where torch.set_default_device says, and a generator of the CPU's draws on no other device.

    `device=None` is for what shall lie there; example inputs are made within `torch.device("cpu")`.
    """
    sources = set(PACKAGE.rglob("*.py"))
    made = 0
    for path in sorted(sources - set((PACKAGE / "measurement" / "examples").glob("*.py"))):
        if path.parent.name == "templates":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
                made += 1
                named = {keyword.arg for keyword in node.keywords} & {"device", None}
                assert named, f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
    assert made > 20
