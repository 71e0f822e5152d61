"""Which bytes were proven: name, size and SHA-256 of each file of a folder that is published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from .card import REPORT_NAME
from .published_files import listed_files

_CHUNK = 1 << 20


class FileEntry(TypedDict):
    """A file: bytes, and the hexadecimal SHA-256 of its content."""

    size: int
    sha256: str


Manifest = dict[str, FileEntry]


def manifest(folder: Path, trust_remote_code: bool = False) -> Manifest:
    """Of all files that a push would upload but the record, which the manifest is part of; of code too, with trust."""
    names = [name for name in listed_files(folder, trust_remote_code).names if name != REPORT_NAME]
    return {name: FileEntry(size=(folder / name).stat().st_size, sha256=_sha256(folder / name)) for name in names}


def changed_files(proven: Mapping[str, FileEntry], found: Mapping[str, FileEntry]) -> list[str]:
    """What is not as it was proven: name and how, in order; empty where all is."""
    changed = []
    for name in sorted({*proven, *found}):
        if name not in found:
            changed.append(f"{name} is missing")
        elif name not in proven:
            changed.append(f"{name} is new")
        elif proven[name] != found[name]:
            changed.append(f"{name} has other content")
    return changed


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
