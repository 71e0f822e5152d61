"""Calibration data: what the user names becomes examples, and these the batches that a model's forward takes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import table, table_columns
from .work import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLES = {".csv", ".json", ".jsonl", ".parquet"}
TENSORS = {".npy", ".safetensors"}


@dataclass(frozen=True)
class Data:
    """The options that name the data and say how much of it is used."""

    source: str | None
    column: str | None = None
    label_column: str | None = None
    split: str = "train"
    config: str | None = None
    samples: int = 300
    batch_size: int = 8
    max_length: int = 128


@dataclass(frozen=True)
class Examples:
    """What was read. `kind` is "text" (strings), "image" (paths or pictures) or "tensor" ({input's name: row}).

    Labels that are numbers may have names.
    """

    kind: str
    items: Sequence[Any]
    labels: Sequence[Any] | None = None
    label_names: Sequence[str] | None = None


def examples(data: Data) -> Examples:
    """Read the data, before any model is loaded.

    Raises:
        UsageError: none given, none found, or of a kind that is not known.
    """
    if data.source is None:
        raise UsageError(
            "no calibration data: add --calibration with examples like those that the model will meet, such as a text file "
            "with a line each. A few hundred do, without labels"
        )
    path = Path(data.source).expanduser()
    if path.is_file():
        found = _of_file(path, data)
    elif path.is_dir() and not data.label_column and (pictures := _pictures(path)):
        found = Examples("image", pictures)
    else:
        found = Examples(*table_columns(table(data.source, data.config, data.split), data.column, data.label_column))
    if data.label_column and found.labels is None:
        raise UsageError(f"{data.source!r} has no columns, so --label-column {data.label_column} finds nothing in it")
    if not found.items:
        raise UsageError(f"{data.source!r} holds no example")
    if len(found.items) > data.samples:
        rows = sorted(random.Random(0).sample(range(len(found.items)), data.samples))
        labels = None if found.labels is None else [found.labels[row] for row in rows]
        found = replace(found, items=[found.items[row] for row in rows], labels=labels)
    return found


def _of_file(path: Path, data: Data) -> Examples:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"{str(path)!r} is no text in UTF-8: {error}") from error
        return Examples("text", [line for line in lines if line.strip()])
    if suffix in TABLES:
        return Examples(*table_columns(table(str(path), data.config, data.split), data.column, data.label_column))
    if suffix in TENSORS:
        return Examples("tensor", _tensor_rows(path))
    known = ", ".join(sorted({".txt", *TABLES, *TENSORS}))
    raise UsageError(f"cannot read {str(path)!r} by its ending: expected {known}, a folder, or a dataset's name")


def _pictures(folder: Path) -> list[Path]:
    """The image files below the folder, unless it is a data set with tables of its own."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    suffixes = {path.suffix.lower() for path in files}
    return [] if suffixes & (TABLES | {".arrow"}) else [path for path in files if path.suffix.lower() in IMAGES]


def _tensor_rows(path: Path) -> list[dict[str, Any]]:
    """{name of forward's argument: its row} for each example; of a .npy file the name is "", the model's main input."""
    try:
        if path.suffix == ".npy":
            import numpy as np
            import torch

            tensors = {"": torch.from_numpy(np.load(path))}
        else:
            from safetensors.torch import load_file

            tensors = load_file(path)
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # safetensors' and numpy's own, and what zero-dimensional tensors raise
        raise UsageError(f"{str(path)!r} holds no arrays of examples: {type(error).__name__}: {error}") from error
    if len(set(lengths.values())) > 1:
        raise UsageError(f"the tensors in {str(path)!r} differ in their first dimension, the examples: {lengths}")
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(next(iter(lengths.values()), 0))]


class Batches:
    """Batches for `relu_ize`, `calibrate` and `sensitivity`: made when they are asked for, as often as wanted."""

    def __init__(self, found: Examples, size: int, collate: Any, label: Any) -> None:
        self.found, self.size, self.collate, self._label = found, size, collate, label

    def __len__(self) -> int:
        return -(-len(self.found.items) // self.size)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        import torch

        for start in range(0, len(self.found.items), self.size):
            batch = dict(self.collate(self.found.items[start : start + self.size]))
            if self.found.labels is not None:
                labels = [self._label(value) for value in self.found.labels[start : start + self.size]]
                batch["labels"] = torch.tensor(labels, device="cpu")
            yield batch


def batches(found: Examples, data: Data, model: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> Batches:
    """The examples as what the model's forward takes, by the tokenizer or image processor of its folder.

    Raises:
        UsageError: the examples do not fit the model, the folder has nothing to prepare them with, or an unknown label.
    """
    from . import prepare

    if found.kind == "tensor":
        collate = prepare.stacked(model)
    elif found.kind == "text":
        collate = prepare.tokenised(model, folder, data.max_length, trust_remote_code, found.items)
    else:
        collate = prepare.pictures(model, folder, trust_remote_code)
    label = prepare.label_of(model, found.label_names)
    for value in found.labels or ():
        label(value)  # all before the work
    return Batches(found, data.batch_size, collate, label)
