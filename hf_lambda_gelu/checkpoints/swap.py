"""Puts a finished folder in its place, so that a kill or a power cut leaves the old one or the new one, whole."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
_HERE = -100  # AT_FDCWD: paths are as they are


def exchange(one: Path, other: Path) -> bool:
    """Both folders change places at once; False where the system or the file system cannot do that."""
    name, before = {"linux": ("renameat2", True), "darwin": ("renamex_np", False)}.get(sys.platform, ("", False))
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    arguments = (_HERE, paths[0], _HERE, paths[1]) if before else paths
    if call(*arguments, _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def flush(folder: Path) -> None:
    """Waits until all that was written there is on the disk. Hard links of other files are, as far as they ever were."""
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path, name)
            if not file.is_symlink() and file.stat().st_nlink == 1:
                _flush(file)
        flush_names(Path(path))


def flush_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(folder)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without
            raise
    finally:
        os.close(opened)
