"""Folders that one process works in: no other takes one while it lives, and the next clears away what a killed one left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: a folder that exists counts as in use, and nothing is cleared away
    fcntl = None  # type: ignore[assignment]

_KEEP = ".keep"
_NO_LOCKS = -1  # the file system has none, or the operating system


class Claim:
    """A new folder, empty, that this process alone works in, and its owner alone can read.

    A lock on the folder itself says that its process lives. The kernel gives it up when the process ends, however it ends.

    Attributes:
        folder: where it is.
        mode: the permissions that the process gives to new folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mode = folder, 0o777
        self._lock: int | None = None
        self._making = False
        self._identity: tuple[int, int] | None = None

    def take(self, wait: float = 2.0, adopt: bool = False) -> None:
        """Makes the folder; one that a killed process left there is cleared away first.

        Args:
            adopt: or is taken over as it is.
            wait: seconds to wait for a process that is just clearing it away.

        Raises:
            BlockingIOError: another process, or another thread, has it.
            OSError: it cannot be made; what lies there belongs to another user, or is no folder.
        """
        end = time.monotonic() + wait
        while True:
            self._making = True
            try:
                self.folder.mkdir()
            except FileExistsError:
                self._making = False
                check_own(self.folder)
            lock = _locked(self.folder)
            if lock is not None and (self._making or (adopt and lock != _NO_LOCKS)):
                self._lock = lock  # first: without it, `remove` would find the folder locked
                found = self.folder.stat()
                self.mode = stat.S_IMODE(found.st_mode)
                self._identity = found.st_dev, found.st_ino
                self.folder.chmod(0o700)
                return
            if lock is not None and lock != _NO_LOCKS:
                _clear(self.folder, lock)
            elif self.folder.exists() and time.monotonic() > end:
                raise BlockingIOError(errno.EWOULDBLOCK, "another process works there", str(self.folder))
            else:
                time.sleep(0.02)

    def is_at(self, place: Path) -> bool:
        """Whether the folder that was taken is there by now, under another name."""
        try:
            found = place.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def leave(self, keep: bool = False) -> None:
        """Gives up the lock; what the folder is by then stays. With `keep`, `clear_left` does not take it for left."""
        if keep:
            (self.folder / _KEEP).touch()
        if self._lock is not None:
            _close(self._lock)
        self._lock, self._making = None, False

    def remove(self) -> None:
        """Removes the folder, if this process has it. May be called after a stop anywhere, and again."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self._making:  # stopped before the lock was there
            lock = _locked(self.folder)
            if lock is not None:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
                _close(lock)
        self.leave()


def clear_left(folder: Path) -> None:
    """Removes a folder, of a killed process of this user; not one that is in use or was kept."""
    with contextlib.suppress(OSError):
        check_own(folder)
        lock = None if (folder / _KEEP).exists() else _locked(folder)
        if lock is not None and lock != _NO_LOCKS:
            _clear(folder, lock)


def check_own(folder: Path) -> None:
    """OSError unless a folder, no link, of this user lies there; nothing at all will do too."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "what lies there is no folder", str(folder))
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))


def _clear(folder: Path, lock: int) -> None:
    try:
        shutil.rmtree(folder)
    finally:
        _close(lock)


def _close(lock: int) -> None:
    if lock != _NO_LOCKS:
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """The lock on a folder, `_NO_LOCKS` where there is no such thing; None where another process has it, or it is gone."""
    if fcntl is None:
        return _NO_LOCKS if folder.is_dir() else None
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here, there = os.fstat(opened), os.stat(folder, follow_symlinks=False)
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):  # or it was cleared away meanwhile
            return opened
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            os.close(opened)
            return _NO_LOCKS
    except BaseException:
        os.close(opened)
        raise
    os.close(opened)
    return None
