"""Which rows of a tensor others were chosen from: the tokens that a router sends to an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def chosen_rows(chosen: Tensor, whole: Tensor) -> Tensor | None:
    """For each row of `chosen` (n, d) the row of `whole` (N, d) that it is a copy of, to the bit.

    Args:
        chosen, whole: of one dtype, on one device.

    Rows that are equal go to an expert together: the k-th of them in `chosen` is the k-th in `whole`.

    Returns:
        (n,) int64; None unless every row is found, with all that are equal to it.
    """
    if chosen.dtype != whole.dtype or chosen.device != whole.device or chosen.shape[-1] != whole.shape[-1]:
        return None
    keys, order = _digests(whole).sort(stable=True)
    wanted, places = _digests(chosen).sort(stable=True)
    first, last = (torch.searchsorted(keys, wanted, right=right) for right in (False, True))
    own_first, own_last = (torch.searchsorted(wanted, wanted, right=right) for right in (False, True))
    if not torch.equal(last - first, own_last - own_first):
        return None
    rows = torch.empty_like(places)
    rows[places] = order[first + torch.arange(len(wanted), device=wanted.device) - own_first]
    return rows if torch.equal(chosen, whole[rows]) else None


_TAKE = (Tensor.__getitem__, Tensor.index_select, torch.index_select)


def taken_rows(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, int] | None:
    """Which rows an operation takes from a matrix by number, (n,), and of how many; None if it does something else."""
    if func not in _TAKE or not isinstance(args[0], Tensor) or args[0].dim() != 2 or not args[0].is_floating_point():
        return None
    index = args[-1]
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype is not torch.long:
        return None
    return index.detach().cpu(), len(args[0])


def from_taken(given: Tensor, taken: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, int] | None:
    """Which rows (n, d) are, of the rows taken last: all of them in order, or a part, which lies in memory within the whole.

    Rows that are sorted by expert are taken together, and each expert gets a piece of what was made of them.
    """
    if given.dim() != 2 or not given.is_contiguous() or not given.numel():
        return None
    whole = given.untyped_storage().nbytes() // (given.element_size() * given.shape[1])
    start, rest = divmod(int(given.storage_offset()), given.shape[1])
    for rows, total in reversed(taken):
        if len(rows) == whole and rest == 0:
            return rows[start : start + len(given)], total
    return None


def _digests(tensor: Tensor) -> Tensor:
    """(rows,) int64, a sum of the elements' bits that does not depend on the order of summation."""
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, 2**62, (tensor.shape[-1],), generator=generator, device="cpu") * 2 + 1
    return (bits * factors.to(bits.device)).sum(-1)  # modulo 2⁶⁴
