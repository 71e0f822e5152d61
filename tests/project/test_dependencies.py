"""What the package imports is what pyproject.toml declares; not what happens to come with something else."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
PACKAGE = ROOT / "hf_lambda_gelu"
# imported inside a function or a guard alone, so that what it needs may be an extra
OPTIONAL = {"hf_lambda_gelu/activation/kernels/cuda_programs.py"}


def imported(source: str) -> tuple[set[str], set[str]]:
    """Top-level names that a module needs to be imported, and those that it can do without: in a function, or guarded."""
    needed: set[str] = set()
    optional: set[str] = set()

    def visit(node: ast.AST, free: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            (optional if free else needed).update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            (optional if free else needed).add(str(node.module).partition(".")[0])
        guarded = isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, free or guarded or inside)

    visit(ast.parse(source), False)
    own = {*sys.stdlib_module_names, "hf_lambda_gelu"}
    return needed - own, optional - own - needed


def name_of(requirement: str) -> str:
    """The distribution of a requirement, as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()


def undeclared(sources: dict[str, str], project: dict) -> Iterator[str]:
    """`file: name` of each import that no requirement of pyproject's [project] table covers."""
    required = {name_of(r) for r in project["dependencies"]}
    extras = {name_of(r) for group in project["optional-dependencies"].values() for r in group}
    distributions = packages_distributions()
    for path, source in sources.items():
        allowed = (required | extras if path in OPTIONAL else required, required | extras)
        for names, declared in zip(imported(source), allowed, strict=True):
            for name in sorted(names):
                if not {name_of(d) for d in distributions.get(name, [name])} & declared:
                    yield f"{path}: {name}"


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Of the package; the templates are written into folders, and run where this package is not."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if "templates" not in path.parts]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_every_import_of_the_package_is_declared(project: dict, sources: dict[str, str]) -> None:
    assert len(sources) > 40
    assert not list(undeclared(sources, project))


@pytest.mark.parametrize("name", ["numpy", "torch", "safetensors", "huggingface_hub", "accelerate"])
def test_a_requirement_that_is_taken_out_is_missed(name: str, project: dict, sources: dict[str, str]) -> None:
    less = {**project, "dependencies": [r for r in project["dependencies"] if name_of(r) != name_of(name)]}
    assert len(less["dependencies"]) == len(project["dependencies"]) - 1
    assert {line.rpartition(" ")[2] for line in undeclared(sources, less)} == {name}


def test_what_a_function_imports_may_be_an_extra(project: dict) -> None:
    """pillow, whose module has another name, is one; at the top of a module it would have to be required."""
    inside = {"a.py": "def draw():\n    import PIL.Image\n"}
    assert not list(undeclared(inside, project))
    assert list(undeclared({"a.py": "import PIL.Image\n"}, project)) == ["a.py: PIL"]
    guarded = {"a.py": "try:\n    import triton\nexcept ImportError:\n    triton = None\n"}
    assert not list(undeclared(guarded, project))
    without = {**project, "optional-dependencies": {}}
    assert list(undeclared(inside, without)) == ["a.py: PIL"]
    assert list(undeclared(guarded, without)) == ["a.py: triton"]
    assert list(undeclared({"a.py": "def f():\n    import no_such_thing\n"}, project)) == ["a.py: no_such_thing"]
