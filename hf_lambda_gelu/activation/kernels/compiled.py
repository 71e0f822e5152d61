"""Compiles a C++ file once, by the machine's own compiler, into a shared library in torch's folder for extensions."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
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
            library = ctypes.CDLL(str(_build(self._source)))
        except (OSError, subprocess.SubprocessError) as error:
            return f"the C++ kernel could not be built: {error}"
        for name, (pointers, sizes, numbers) in self._functions.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_int] * numbers
            function.restype = self._result
        return library


def _build(source: Path) -> Path:
    """The shared library's path; compiled if no earlier process of the same sources, compiler and CPU has."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler found (looked for {', '.join(candidates)}); install g++ or set CXX")
    flags = _FLAGS + _CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    text = b"".join(path.read_bytes() for path in (source, *sorted(_HEADERS.glob("*.h"))))
    key = hashlib.sha256(text + " ".join([compiler, *flags, platform.machine()]).encode()).hexdigest()
    path = folder() / f"kernel-{key[:16]}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as unfinished:
            pass
        try:
            command = [compiler, *flags, f"-I{_HEADERS}", str(source), "-o", unfinished.name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise OSError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
            os.replace(unfinished.name, path)  # so that another process sees all of it or nothing
        finally:
            Path(unfinished.name).unlink(missing_ok=True)
    return path


def folder() -> Path:
    """Where libraries are kept; a new one for this process where that cannot be written to."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "torch_extensions")
    kept = Path(root) / "hf_lambda_gelu"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hf_lambda_gelu-"))
