"""Compiles a C++ file once, by the machine's own compiler, into a shared library in torch's folder for extensions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# -fno-trapping-math and -fno-math-errno let min and max become one instruction; neither changes a value
_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# By what torch finds the CPU capable of, not -march=native: a folder shared by unlike machines keeps one file for each.
_CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}

_HEADERS = Path(__file__).parent
_UNFINISHED = "unfinished-"
_LIMIT_SECONDS = 300
_ROOM = 4 << 20  # bytes; a library has some 100 kB


class Library:
    """The functions of a C++ file, compiled at the first use.

    Args:
        source: the file, which may include the headers of this folder.
        functions: name → how many pointers, then sizes, then numbers it takes.
        result: what each returns; nothing by default.
    """

    def __init__(self, source: Path, functions: Mapping[str, tuple[int, int, int]], result: Any = None) -> None:
        self._source, self._functions, self._result = source, functions, result

    def unavailable(self) -> str | None:
        """What keeps the kernel from running on this machine, in words; None if nothing does."""
        return self._loaded if isinstance(self._loaded, str) else None

    def loaded(self) -> ctypes.CDLL:
        """The library.

        Raises:
            RuntimeError: it cannot be built; the message says why.
        """
        if isinstance(self._loaded, str):
            raise RuntimeError(self._loaded)
        return self._loaded

    @functools.cached_property  # a failure too: a compiler is not tried again at every call
    def _loaded(self) -> ctypes.CDLL | str:
        try:
            library = ctypes.CDLL(str(_build(self._source, list(self._functions))))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return f"the C++ kernel could not be built: {error}"
        for name, (pointers, sizes, numbers) in self._functions.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_int] * numbers
            function.restype = self._result
        return library


def _build(source: Path, functions: Sequence[str] = ()) -> Path:
    """The shared library's path; compiled if no earlier process of the same sources, compiler and CPU has.

    A name holds the hash of its library's own bytes: what a full disk or a kill left of one is not loaded, but built anew.
    """
    compiler = _compiler()
    flags = _FLAGS + _CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    text = b"".join(path.read_bytes() for path in (source, *sorted(_HEADERS.glob("*.h"))))
    key = hashlib.sha256(text + " ".join([*compiler, *flags, platform.machine()]).encode()).hexdigest()[:16]
    kept = folder()
    found = next(filter(_is_whole, sorted(kept.glob(f"kernel-{key}-*.so"))), None)
    if found is not None:
        return found
    if not _has_room(kept):
        kept = Path(_own_folder().name)
    _sweep(kept)
    handle, unfinished = tempfile.mkstemp(dir=kept, prefix=_UNFINISHED, suffix=".so")
    os.close(handle)
    try:
        _compile([*compiler, *flags, f"-I{_HEADERS}", str(source), "-o", unfinished])
        _try_out(compiler[0], unfinished, functions)
        os.chmod(unfinished, 0o700)
        path = kept / f"kernel-{key}-{_digest(Path(unfinished).read_bytes())}.so"
        os.replace(unfinished, path)  # so that another process sees all of it or nothing
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _compile(command: list[str]) -> None:
    """Runs the compiler; OSError where it fails, or says that it does not and has written nothing."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_LIMIT_SECONDS
    )
    said = done.stderr.strip()[-500:]
    if done.returncode < 0:
        raise OSError(f"{command[0]} was ended by signal {-done.returncode}: {said or 'it said nothing'}")
    if done.returncode:
        raise OSError(f"{command[0]} failed: {said or f'code {done.returncode}, and it said nothing'}")
    if not os.path.getsize(command[-1]):
        raise OSError(f"{command[0]} reported no error and wrote nothing: {said}")


def _try_out(compiler: str, library: str, functions: Sequence[str]) -> None:
    """OSError unless what a compiler wrote is a library with these functions; first in another process, as half of one may
    end the process that loads it."""
    command = [sys.executable, "-I", "-S", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", library]
    if sys.executable:  # which an embedded Python lacks
        tried = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_SECONDS)
        if tried.returncode < 0:
            raise OSError(f"{compiler} reported no error, and a process that loads what it wrote dies: is the disk full?")
    loaded = ctypes.CDLL(library)
    for name in functions:
        if not hasattr(loaded, name):
            raise OSError(f"{compiler} reported no error, and what it wrote lacks {name}")


def _has_room(place: Path) -> bool:
    return shutil.disk_usage(place).free > _ROOM and os.access(place, os.W_OK)


def _sweep(place: Path) -> None:
    """Removes what processes that were killed as they compiled have left."""
    for left in place.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 2 * _LIMIT_SECONDS:
                left.unlink()


def _compiler() -> list[str]:
    """The command, with the options that CXX may have."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    looked = " ".join(asked) if asked else "c++, g++, clang++"
    raise FileNotFoundError(f"no C++ compiler found (looked for {looked}); install g++ or set CXX")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    """Whether a library holds what its name says, and is this user's alone."""
    return _is_own(path) and path.is_file() and path.stem.rpartition("-")[2] == _digest(path.read_bytes())


def _is_own(path: Path) -> bool:
    """Whether it belongs to this user, is no link, and nobody else may write into it."""
    found = path.lstat()
    if not hasattr(os, "geteuid"):
        return not stat.S_ISLNK(found.st_mode)
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)


def folder() -> Path:
    """Where libraries are kept, which this user alone may write into; else a new one, for this process.

    Who can write there can run code as this user.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "torch_extensions")
    kept = Path(root) / "hf_lambda_gelu"
    try:
        if root.startswith("~"):  # a user without a home
            raise FileNotFoundError(root)
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(kept) and kept.lstat().st_uid == os.geteuid() and not kept.is_symlink():
            kept.chmod(0o700)  # made by an earlier version, in the mode of any folder
        if _is_own(kept) and all(map(_is_safe, kept.resolve().parents)):
            return kept
    except (OSError, AttributeError):
        pass
    return Path(_own_folder().name)


def _is_safe(parent: Path) -> bool:
    """Whether nobody else can put another folder in the place of one in there."""
    mode = parent.stat().st_mode
    return not mode & 0o002 or bool(mode & stat.S_ISVTX)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hf_lambda_gelu-")  # removed as the process ends
