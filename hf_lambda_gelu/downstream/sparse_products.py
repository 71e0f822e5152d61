"""The C++ kernel that reads the rows of a matrix that a ReLU lets through: sparse_products.cpp, called with pointers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..activation.kernels.compiled import Library

DTYPES = (torch.float32, torch.bfloat16)

_LIBRARY = Library(
    Path(__file__).with_name("sparse_products.cpp"), {"sparse_gathered": (4, 3, 2), "sparse_chosen": (5, 3, 2)}, ctypes.c_int
)
unavailable = _LIBRARY.unavailable


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
    done = _LIBRARY.loaded().sparse_gathered(
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
    done = _LIBRARY.loaded().sparse_chosen(
        gate.data_ptr(), x.data_ptr(), rows.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), n, d,
        most, x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out if done else None
