"""The layout of package and tests, from their syntax alone: short functions, tests in the rooms of what they test."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, TESTS = ROOT / "hf_lambda_gelu", ROOT / "tests"
LONGEST = 60  # lines of a function, from `def` to its end
NO_ROOMS = {"cli", "project", "support"}  # a module, the project itself, what tests share
MODULES = sorted(TESTS.rglob("test_*.py"))


def imported(text: str) -> set[str]:
    """Every part of every module's name that the code imports, and the names that it imports from modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
    return names


def long_functions(text: str) -> Iterator[tuple[str, int]]:
    """Functions of more than `LONGEST` lines, also those within others, and how long they are."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST:
                yield node.name, lines


def test_no_test_imports_another() -> None:
    """What several tests need is in tests/support; that takes nothing from tests either."""
    names = {path.stem for path in MODULES}
    found = {
        str(path.relative_to(TESTS)): taken
        for path in sorted(TESTS.rglob("*.py"))
        if (taken := imported(path.read_text(encoding="utf-8")) & names)
    }
    assert found == {}


def test_names_are_unique() -> None:
    """pytest imports test modules by their names alone."""
    counts = Counter(path.stem for path in MODULES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_folders_of_tests_are_rooms() -> None:
    """tests/surgery/refit is there for hf_lambda_gelu/surgery/refit."""
    folders = {path.parent.relative_to(TESTS) for path in MODULES} - {Path()}
    rooms = {folder for folder in folders if folder.parts[0] not in NO_ROOMS}
    assert sorted(str(room) for room in rooms if not (PACKAGE / room / "__init__.py").is_file()) == []
    assert {room.parts[0] for room in rooms} >= {
        "activation",
        "structure",
        "measurement",
        "surgery",
        "checkpoints",
        "training",
    }


def test_functions_are_short() -> None:
    """No function of the package is longer than a screen; what is made for others' folders, in templates, aside."""
    found = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path in sorted(PACKAGE.rglob("*.py"))
        if "templates" not in path.parts
        for name, lines in long_functions(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"functions of more than {LONGEST} lines:\n" + "\n".join(found)


@pytest.mark.parametrize(("lines", "expected"), [(60, []), (61, [("method", 61)])])
def test_lengths_are_counted(lines: int, expected: list[tuple[str, int]]) -> None:
    """From `def` to the end, decorators aside, also within a class."""
    body = "        x = 1\n" * (lines - 1)
    assert list(long_functions(f"class A:\n    @cached\n    def method(self):\n{body}")) == expected


def test_imports_are_seen() -> None:
    """Every form of import."""
    text = "import a.b as c\nfrom d.e import f as g\ndef h():\n    from . import i\n"
    assert imported(text) == {"a", "b", "d", "e", "f", "", "i"}
