"""What the reports of all verbs share: dictionaries for JSON, the pieces of their tables, progress bars. Knows no model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from transformers.utils import logging

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def to_dict(report: DataclassInstance) -> dict[str, Any]:
    """The fields of a report, and of all dataclasses in it, as JSON can hold them.

    Tuples become lists and paths strings. Fields that the repr leaves out (histograms) are left out here too. Numbers stay
    what they are, NaN as well: see `finite_or_none`.
    """
    return {f.name: _plain(getattr(report, f.name)) for f in fields(report) if f.repr}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def finite_or_none(value: Any) -> Any:
    """None in place of a NaN or an infinity, which JSON has no word for; anything else as it is."""
    not_finite = isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
    return None if not_finite else value


def span(names: Sequence[str]) -> str:
    """The first of the names and the last, as in "layer.0 … layer.11"; the name itself if there is one."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def table(header: Sequence[str], formats: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal: header, then rows, two spaces before each cell.

    Args:
        formats: how each column after the first is aligned, as `format` takes it: ">9" is to the right in 9 characters. The
            first is to the left, as wide as its longest cell.
        rows: cells as text. A row may be shorter than the header, or have a remark at its end that no column is for.
    """
    width = max(len(row[0]) for row in [header, *rows])
    columns = [f"<{width}", *formats]
    return [
        "".join("  " + format(cell, columns[i] if i < len(columns) else "") for i, cell in enumerate(row))
        for row in [header, *rows]
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def length(iterable: Iterable[Any]) -> int | None:
    """How many items there are; None where that is not known, as of a generator."""
    with contextlib.suppress(Exception):  # loaders raise what they like
        return len(iterable)  # type: ignore[arg-type]  # what has no length raises
    return None


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The same items in the same order, with transformers' progress bar on stderr while they are worked on.

    There is none without a terminal, nor after `transformers.utils.logging.disable_progress_bar()`. Nothing of it stays
    behind.

    Args:
        total: how many items there are, if the iterable does not know it itself.

    Examples:
        >>> for batch in progress(batches, "calibration"):
        ...     model(**batch)
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return iterable
    total = length(iterable) if total is None else total
    items = iterable if total is not None else iter(iterable)  # tqdm would ask for the length again
    bar = logging.tqdm(items, desc=description, total=total, leave=False, file=sys.stderr, dynamic_ncols=True)
    return cast("Iterable[T]", bar)
