"""The C++ kernel for CPUs: compiled once by the machine's own compiler, kept in torch's folder for extensions."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .layout import BASE_NUMBERS, in_layout_of, known_view

DTYPES = (torch.float32, torch.bfloat16)

_SOURCE = Path(__file__).with_name("cpu.cpp")
# -fno-trapping-math and -fno-math-errno let min and max become one instruction; neither changes a value
_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# By what torch finds the CPU capable of, not -march=native: a folder shared by unlike machines keeps one file for each.
_CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}


def forward(x: Tensor, hardness: Tensor, base: str) -> Tensor:
    """f(x; λ), laid out as x; see `lambda_gelu`. λ broadcasts to x such that `layout.view` knows it."""
    out = torch.empty_like(x)
    if x.numel():
        source, flat = in_layout_of(x, out), hardness.to(torch.float32).contiguous()
        _library().lambda_gelu_forward(
            source.data_ptr(), flat.data_ptr(), out.data_ptr(), *known_view(out, hardness), *_numbers(x, base)
        )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, hardness: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """∂L/∂x, laid out as x, and ∂L/∂λ, of λ's shape and dtype."""
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(hardness)
    source, upstream, flat = in_layout_of(x, grad_x), in_layout_of(grad, grad_x), hardness.to(torch.float32).contiguous()
    by_hardness = torch.empty_like(flat)
    _library().lambda_gelu_backward(
        source.data_ptr(), upstream.data_ptr(), flat.data_ptr(), grad_x.data_ptr(), by_hardness.data_ptr(),
        *known_view(grad_x, hardness), *_numbers(x, base),
    )  # fmt: skip
    return grad_x, by_hardness.to(hardness.dtype)


def _numbers(x: Tensor, base: str) -> tuple[bool, int, int]:
    return x.dtype is torch.bfloat16, BASE_NUMBERS[base], torch.get_num_threads()


def unavailable() -> str | None:
    """What keeps the kernel from running on this machine, in words; None if nothing does."""
    found = _load()
    return found if isinstance(found, str) else None


def _library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@functools.cache  # a failure too: a compiler is not tried again at every call
def _load() -> ctypes.CDLL | str:
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ kernel could not be built: {error}"
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for function, pointers in ((loaded.lambda_gelu_forward, 3), (loaded.lambda_gelu_backward, 5)):
        function.argtypes, function.restype = [pointer] * pointers + [size] * 3 + [number] * 3, None
    return loaded


def _build() -> Path:
    """The shared library's path; compiled if no earlier process of the same source, compiler and CPU has."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler found (looked for {', '.join(candidates)}); install g++ or set CXX")
    flags = _FLAGS + _CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join([compiler, *flags, platform.machine()]).encode()).hexdigest()
    path = _folder() / f"kernel-{key[:16]}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as unfinished:
            pass
        try:
            done = subprocess.run(
                [compiler, *flags, str(_SOURCE), "-o", unfinished.name], capture_output=True, text=True, timeout=300
            )
            if done.returncode:
                raise OSError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
            os.replace(unfinished.name, path)  # so that another process sees all of it or nothing
        finally:
            Path(unfinished.name).unlink(missing_ok=True)
    return path


def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "torch_extensions")
    folder = Path(root) / "hf_lambda_gelu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hf_lambda_gelu-"))  # a home that cannot be written to: built by every process
