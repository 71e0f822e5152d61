"""Compiles a C++ file once, by the machine's own compiler, into a shared library in torch's folder for extensions."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# -fno-trapping-math and -fno-math-errno let min and max become one instruction; neither changes a value
_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# By what torch finds the CPU capable of, not -march=native: a folder shared by unlike machines keeps one file for each.
_CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}


def load(source: Path) -> ctypes.CDLL | str:
    """The library that `source` makes; why there is none, in words, where it cannot be built."""
    try:
        return ctypes.CDLL(str(_build(source)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ kernel could not be built: {error}"


def _build(source: Path) -> Path:
    """The shared library's path; compiled if no earlier process of the same source, compiler and CPU has."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler found (looked for {', '.join(candidates)}); install g++ or set CXX")
    flags = _FLAGS + _CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    key = hashlib.sha256(source.read_bytes() + " ".join([compiler, *flags, platform.machine()]).encode()).hexdigest()
    path = folder() / f"kernel-{key[:16]}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as unfinished:
            pass
        try:
            done = subprocess.run(
                [compiler, *flags, str(source), "-o", unfinished.name], capture_output=True, text=True, timeout=300
            )
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
