"""Folders that are made whole or not at all, and what can be known before the work that fills them."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from ..structure.transaction import scratch_in_use


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Within the block, a temporary folder beside `folder`, which takes its place at the end, or is removed on an error.

    A process that is killed leaves `.<name>-<random>` behind, and `folder` as it was.

    Raises:
        ValueError: nothing can be written there; without `overwrite`, something that is not empty has appeared there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {str(folder.parent)!r}: {error}. Choose another folder") from error
    temporary = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
    scratch_in_use(temporary)
    try:
        try:
            temporary.mkdir()  # in the mode that the process gives to new folders
        except OSError as error:
            raise ValueError(f"cannot write into {str(folder.parent)!r}: {error}. Choose another folder") from error
        yield temporary
        if overwrite:
            _put_in_place(temporary, folder)
        else:
            _put_where_nothing_is(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def of_the_cache(link: Path) -> bool:
    """Whether a link leads to a file that the Hub's client downloaded."""
    target = Path(os.path.realpath(link))
    return target.parent.name == "blobs" and target.is_relative_to(os.path.realpath(constants.HF_HUB_CACHE))


def check_new(folder: Path, overwrite: bool | None = None) -> None:
    """Raises ValueError unless a folder can be made there; `overwrite` None: where the caller has no such option."""
    if folder == Path.cwd() or (folder.exists() and not folder.is_dir()):
        kind = "the current folder" if folder.is_dir() else "a file"
        raise ValueError(f"{str(folder)!r} exists and is {kind}: give the name of a folder to make")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        hint = "" if overwrite is None else ", or pass overwrite=True"
        raise ValueError(f"{str(folder)!r} exists and is not empty: choose another folder{hint}")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes `folder` if need be; raises ValueError, saying why, if nothing can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write into the output folder {str(folder)!r}: {error}. Choose another folder") from error


def _put_where_nothing_is(temporary: Path, folder: Path) -> None:
    """One rename, which takes the place of an empty folder at most, so that two processes cannot both succeed."""
    try:
        try:
            temporary.rename(folder)
        except FileExistsError:  # on Windows, of an empty folder too
            folder.rmdir()
            temporary.rename(folder)
    except OSError as error:
        if not (folder.exists() or folder.is_symlink()):
            raise
        raise ValueError(
            f"{str(folder)!r} has appeared meanwhile, made by somebody else, and was not touched. Choose another folder"
        ) from error


def _put_in_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = temporary.with_name(temporary.name + "-old")
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    try:
        shutil.rmtree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
