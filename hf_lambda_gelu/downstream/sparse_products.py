"""The C++ kernel that reads the rows of a matrix that a ReLU lets through: sparse_products.cpp, called with pointers."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..activation.kernels.compiled import load

DTYPES = (torch.float32, torch.bfloat16)

_SOURCE = Path(__file__).with_name("sparse_products.cpp")


def gathered(h: Tensor, rows: Tensor, bias: Tensor | None, most: int) -> Tensor | None:
    """b + Σ_{j: h_j ≠ 0} h_j rows[j]; None if more than `most` are not 0.

    Args:
        h: n elements, contiguous.
        rows: (n, k), contiguous, of h's dtype, one of `DTYPES`; the weight of a linear map, transposed.
        bias: (k,) or None.

    Returns:
        (…, k), … as in h.
    """
    n, k = rows.shape
    out = h.new_empty((*h.shape[:-1], k))
    done = _library().sparse_gathered(
        h.data_ptr(), rows.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), n, k, most,
        h.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out if done else None


def chosen(gate: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None, most: int) -> Tensor | None:
    """b_j + rows[j] · x where gate_j ≠ 0, and 0 elsewhere; None if more than `most` are not 0.

    Args:
        gate: n elements, contiguous.
        x: d elements, contiguous.
        rows: (n, d), contiguous, of x's dtype, one of `DTYPES`; the weight of a linear map.
        bias: (n,) or None.

    Returns:
        (…, n), … as in x.
    """
    n, d = rows.shape
    out = x.new_empty((*x.shape[:-1], n))
    done = _library().sparse_chosen(
        gate.data_ptr(), x.data_ptr(), rows.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), n, d,
        most, x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out if done else None


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
    loaded = load(_SOURCE)
    if isinstance(loaded, str):
        return loaded
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for function, pointers in ((loaded.sparse_gathered, 4), (loaded.sparse_chosen, 5)):
        function.argtypes, function.restype = [pointer] * pointers + [size] * 3 + [number] * 2, number
    return loaded
