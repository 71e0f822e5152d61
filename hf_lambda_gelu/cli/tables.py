"""Tables by the `datasets` library: files, folders and the Hub's data sets; which columns hold what."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .work import UsageError, WorkFailed

if TYPE_CHECKING:
    from datasets import Dataset

_USUAL = ("text", "sentence", "image", "img")


def table(source: str, config: str | None, split: str) -> Dataset:
    """The split of a csv, json, jsonl or parquet file, of a folder, or of a data set on the Hub.

    Raises:
        UsageError: no such data set or split.
        WorkFailed: the Hub cannot be reached.
    """
    import datasets
    from huggingface_hub import constants

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(source).expanduser()
    try:
        if path.is_file():
            kind = path.suffix.lower().removeprefix(".").replace("jsonl", "json")
            found: Any = datasets.load_dataset(kind, data_files=str(path))
        elif path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else source, config)
    except (FileNotFoundError, ValueError) as error:  # no such data set, no data files in it, or an unknown config
        raise UsageError(f"there are no data in {source!r}: {error}") from error
    except ConnectionError as error:
        if constants.HF_HUB_OFFLINE:
            raise UsageError(f"there are no data in {source!r}, and HF_HUB_OFFLINE is set: unset it to download") from error
        raise WorkFailed(f"the data set {source!r} cannot be downloaded: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise UsageError(f"{source!r} cannot be read: {error.__cause__ or error}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UsageError(f"{source!r} has no split {split!r}, it has {', '.join(found)}: name one with --split")
    return found[split]


def table_columns(rows: Dataset, column: str | None, label_column: str | None) -> tuple[str, Sequence[Any], Any, Any]:
    """(kind, examples, labels or None, their names or None): of the column that is named, or the one that can be meant.

    Raises:
        UsageError: no such column, or several that could be meant.
    """
    import datasets

    for name, option in ((column, "--column"), (label_column, "--label-column")):
        if name is not None and name not in rows.column_names:
            raise UsageError(f"there is no column {name!r}, the data have {', '.join(rows.column_names)}: {option}")

    def kind_of(name: str) -> str | None:
        feature = rows.features[name]
        if isinstance(feature, datasets.Image):
            return "image"
        return "text" if getattr(feature, "dtype", None) in ("string", "large_string") else None

    kinds = {name: kind for name in rows.column_names if name != label_column and (kind := kind_of(name))}
    if column is None:
        usual = [name for name in _USUAL if name in kinds]
        meant = usual[:1] or list(kinds)
        if len(meant) != 1:
            raise UsageError(
                f"{len(meant)} columns could hold the examples, of {', '.join(rows.column_names)}: name one with --column"
            )
        column = meant[0]
        if not usual and label_column is None and rows.info.builder_name == "csv":
            raise UsageError(
                f"the first line of a csv holds the names of its columns, and it is not plain that {column!r} is one: if "
                f"so, say --column {shlex.quote(column)}; if it is an example, put a line of names before it"
            )
    elif column not in kinds:
        raise UsageError(f"the column {column!r} holds neither texts nor images, but {rows.features[column]}")
    labels = None if label_column is None else list(rows[label_column])
    values: Any = rows[column]  # pictures are decoded when they are looked at
    if kinds[column] == "text":
        values = list(values)
        if None in values or (labels is not None and None in labels):
            raise UsageError(f"the column {column!r} or its label is empty in some rows: leave these rows out")
    names = None if label_column is None else getattr(rows.features[label_column], "names", None)
    return kinds[column], values, labels, names
