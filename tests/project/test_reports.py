"""What all reports share: dictionaries, tables, progress bars."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers.utils import logging

from hf_lambda_gelu import reports


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Terminal]]:
    """Puts a terminal in the place of stderr when called: pytest puts its own stderr there when a test starts."""
    logging.enable_progress_bar()

    def put() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    yield put
    logging.enable_progress_bar()


@dataclass(frozen=True)
class Part:
    pair: tuple[str, ...]
    hidden: object = field(default=None, repr=False)


@dataclass
class Whole:
    folder: Path
    parts: list[Part]
    by_name: dict[str, tuple[float, float]]


def test_to_dict() -> None:
    report = Whole(Path("a") / "b", [Part(("x", "y"), object())], {"loss": (1.0, 2.0)})
    expected = {"folder": str(Path("a/b")), "parts": [{"pair": ["x", "y"]}], "by_name": {"loss": [1.0, 2.0]}}
    assert reports.to_dict(report) == expected
    assert json.loads(json.dumps(reports.to_dict(report))) == expected


@pytest.mark.parametrize(("value", "expected"), [(math.nan, None), (-math.inf, None), (2.5, 2.5), ("nan", "nan"), (3, 3)])
def test_finite_or_none(value: object, expected: object) -> None:
    assert reports.finite_or_none(value) == expected


def test_tables() -> None:
    assert reports.span(["a"]) == "a"
    assert reports.span(["a.0", "a.1", "a.2"]) == "a.0 … a.2"
    lines = reports.table(
        ["site", "λ", "how"], [">4", "<5"], [["layer", "1", "x"], ["b", "2", "y", "(a remark)"], ["c", "3"]]
    )
    assert lines == ["  site      λ  how  ", "  layer     1  x    ", "  b         2  y      (a remark)", "  c         3"]
    assert reports.markdown_table(["", "λ"], [["a", "1"]]) == "|  | λ |\n| --- | --- |\n| a | 1 |"


def test_a_bar_on_a_terminal(terminal: Callable[[], Terminal]) -> None:
    """It counts to the length, or to the total that it is told, and is wiped at the end."""
    stream = terminal()
    assert list(reports.progress([3, 1, 2], "looking")) == [3, 1, 2]
    assert "looking" in stream.getvalue()
    assert "/3 [" in stream.getvalue()
    assert stream.getvalue().endswith("\r")
    assert list(reports.progress(iter([3, 1]), "again", 7)) == [3, 1]
    assert "again" in stream.getvalue()
    assert "/7 [" in stream.getvalue()


def test_items_without_a_length(terminal: Callable[[], Terminal]) -> None:
    """Loaders whose length raises anything at all are iterated all the same."""

    class Loader:
        def __len__(self) -> int:
            raise NotImplementedError

        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    stream = terminal()
    assert [i for i in reports.progress(Loader(), "looking")] == [1, 2]  # noqa: C416  # list() asks for the length
    assert list(reports.progress((i for i in [1, 2]), "looking")) == [1, 2]
    assert "looking: 0it" in stream.getvalue()


def test_nothing_when_switched_off(terminal: Callable[[], Terminal]) -> None:
    stream = terminal()
    logging.disable_progress_bar()
    assert list(reports.progress([1, 2], "looking")) == [1, 2]
    assert stream.getvalue() == ""


def test_nothing_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [1, 2]
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert reports.progress(items, "looking") is items
        assert stream is None or stream.getvalue() == ""
