"""Folders that are made whole or not at all, and what can be known before the work that fills them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from transformers.utils import CONFIG_NAME

from ..structure.claims import Claim, clear_left
from ..structure.transaction import if_it_fails
from .swap import exchange, flush, flush_names

_PARTIAL, _OLD, _UNFINISHED = "hf_lambda_gelu-partial", "hf_lambda_gelu-old", "hf_lambda_gelu-unfinished"
_APPEARED = "{!r} has appeared meanwhile, made by somebody else, and was not touched. Choose another folder"


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Within the block, a new folder beside `folder`, which takes its place at the end, or is removed on an error.

    No other process makes the same folder meanwhile. Files are on the disk before the one step that puts them in place, so
    that a kill leaves what was there or all that is new, and beside it a `.<name>.hf_lambda_gelu-partial`, which
    the next call removes. A link stays one; the folder that it leads to is made. An existing folder's mode is kept.

    Callers ask `check_new` before their work.

    Raises:
        ValueError: as `check_new`; nothing can be written there; another process is making it; something has appeared there
            since, which was not touched.
    """
    target = Path(os.path.realpath(folder))
    if _something_in(target) and not overwrite:
        raise ValueError(_APPEARED.format(str(folder)))
    check_new(folder, overwrite)
    new = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    claim, was_there = Claim(_beside(target, _PARTIAL)), target.exists()
    if_it_fails(claim.remove)
    try:
        _take(claim, target)
        yield claim.folder
        flush(claim.folder)
        claim.folder.chmod(_mode(target, claim.mode))
        if overwrite and _something_in(target):
            _replace(claim, target)
        else:
            _put_where_nothing_is(claim.folder, target)
        flush_names(target.parent)
        claim.leave()
    except BaseException:
        _put_back(claim, target, was_there)
        claim.remove()
        for parent in new:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                parent.rmdir()
        raise
    clear_left(claim.folder)  # what was replaced: from here on the new one stays
    clear_left(_beside(target, _OLD))


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Within the block, a folder beside `folder` for work that a killed process may have begun: what that left is in it.

    Afterwards it is gone, whether the work succeeded or failed: a kill alone leaves it. What a killed process left stays,
    with what was added, if the work fails again. No other process has it meanwhile.

    Raises:
        ValueError: nothing can be written there; another process is making the same folder.
    """
    target = Path(os.path.realpath(folder))
    new = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    claim = Claim(_beside(target, _UNFINISHED))
    left = claim.folder.is_dir() and any(claim.folder.iterdir())
    give_up = claim.leave if left else claim.remove
    if_it_fails(give_up)
    try:
        _take(claim, target, adopt=True)
        yield claim.folder
        claim.remove()
    except BaseException:
        give_up()
        for parent in new:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                parent.rmdir()
        raise


def of_the_cache(link: Path) -> bool:
    """Whether a link leads to a file that the Hub's client downloaded."""
    target = Path(os.path.realpath(link))
    return target.parent.name == "blobs" and target.is_relative_to(os.path.realpath(constants.HF_HUB_CACHE))


def check_new(folder: Path, overwrite: bool | None = None) -> None:
    """Raises ValueError unless a folder can be made there; `overwrite` None: where the caller has no such option."""
    target = Path(os.path.realpath(folder))
    _undo_half_swap(target)
    reason = _why_not(folder, target)
    if reason:
        raise ValueError(f"{str(folder)!r} {reason}: give the name of a folder to make")
    if not _something_in(target):
        return
    if not overwrite:
        hint = "" if overwrite is None else ", or pass overwrite=True"
        raise ValueError(f"{str(folder)!r} exists and is not empty: choose another folder{hint}")
    if not (target / CONFIG_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {CONFIG_NAME}, so it is no saved model, and overwrite=True would delete all of it: "
            "choose another folder, or empty this one"
        )


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes `folder` if need be; raises ValueError, saying why, if nothing can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write into the output folder {str(folder)!r}: {error}. Choose another folder") from error


def _why_not(folder: Path, target: Path) -> str | None:
    """What stands in the way of a folder there, whatever is in it."""
    if folder.is_symlink() and not folder.exists():
        return "is a link that leads nowhere"
    if target.exists() and not target.is_dir():
        return "exists and is a file"
    if not target.exists():
        return None
    here = Path.cwd().resolve()
    if target == here:
        return "exists and is the current folder"
    if target in here.parents:
        return "exists and holds the current folder"
    if target == Path.home().resolve():
        return "is your home folder"
    if os.path.ismount(target):
        return "is a mount point, which nothing can take the place of"
    return None


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _something_in(target: Path) -> bool:
    return target.exists() and any(target.iterdir())


def _take(claim: Claim, target: Path, adopt: bool = False) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        claim.take(adopt=adopt)
    except BlockingIOError as error:
        raise ValueError(
            f"another process is making {str(target)!r} just now: choose another folder, or wait for it"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot write into {str(target.parent)!r}: {error}. Choose another folder") from error


def _mode(target: Path, new: int) -> int:
    return stat.S_IMODE(target.stat().st_mode) if target.is_dir() else new


def _put_where_nothing_is(made: Path, target: Path) -> None:
    """One rename, which takes the place of an empty folder at most, so that nothing that has appeared there is lost."""
    try:
        try:
            made.rename(target)
        except FileExistsError:  # on Windows, of an empty folder too
            target.rmdir()
            made.rename(target)
    except OSError as error:
        if not os.path.lexists(target):
            raise
        raise ValueError(_APPEARED.format(str(target))) from error


def _replace(claim: Claim, target: Path) -> None:
    """The new folder in the place of the old one, which is kept aside."""
    if exchange(claim.folder, target):
        return
    target.rename(_beside(target, _OLD))  # a kill from here on: `_undo_half_swap`
    claim.folder.rename(target)


def _put_back(claim: Claim, target: Path, was_there: bool) -> None:
    """After a stop: what was in the place of the new folder, if that is there already."""
    old = _beside(target, _OLD)
    if claim.is_at(target) and os.path.lexists(claim.folder):
        exchange(claim.folder, target)
    elif claim.is_at(target):
        target.rename(claim.folder)
    if not os.path.lexists(target) and os.path.lexists(old):
        old.rename(target)
    elif was_there and not os.path.lexists(target):
        target.mkdir()  # an empty one


def _undo_half_swap(target: Path) -> None:
    """Puts back the folder that a kill between two renames left aside; deletes what one after them left."""
    old = _beside(target, _OLD)
    if not os.path.lexists(old):
        return
    if target.exists():
        clear_left(old)
    else:
        old.rename(target)
