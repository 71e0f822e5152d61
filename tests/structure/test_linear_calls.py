"""Every operation that multiplies by a parameter, read as linear maps: against products that numpy makes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lambda_gelu.structure.linear_calls import LinearCall
from hf_lambda_gelu.structure.linear_maps import Parameters, watch_linears

Operation = Callable[[Tensor, nn.Parameter], Tensor]

# what → (shape of x, shape of the parameter, the operation)
ONE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Operation]] = {
    "x @ W": ((2, 5, 6), (6, 4), lambda x, w: x @ w),
    "x @ W.T": ((2, 5, 6), (4, 6), lambda x, w: x @ w.T),
    "square": ((5, 6), (6, 6), lambda x, w: x @ w),
    "square, transposed": ((5, 6), (6, 6), lambda x, w: x.matmul(w.mT)),
    "a vector": ((6,), (6, 4), lambda x, w: x @ w),
    "mm": ((5, 6), (4, 6), lambda x, w: torch.mm(x, w.t())),
    "method mm": ((5, 6), (6, 4), lambda x, w: x.mm(w)),
    "mv": ((6,), (4, 6), lambda x, w: torch.mv(w, x)),
    "W @ x": ((2, 6, 5), (4, 6), lambda x, w: w @ x),
    "W.T @ x": ((6, 5), (6, 4), lambda x, w: w.transpose(0, 1) @ x),
    "linalg": ((2, 5, 6), (6, 4), lambda x, w: torch.linalg.matmul(x, w)),
    "linear of a transpose": ((5, 6), (6, 4), lambda x, w: F.linear(x, w.T)),
    "einsum": ((2, 5, 6), (6, 4), lambda x, w: torch.einsum("bnd,dk->bnk", x, w)),
    "einsum, channels first": ((2, 6, 5), (4, 6), lambda x, w: torch.einsum("oc,bcn->bon", w, x)),
    "einsum, other order": ((2, 5, 6), (6, 4), lambda x, w: torch.einsum("xyz,zq->qyx", x, w)),
    "einsum, ellipsis": ((2, 5, 6), (6, 4), lambda x, w: torch.einsum("...d,dk->...k", x, w)),
    "einsum, no arrow": ((5, 6), (6, 4), lambda x, w: torch.einsum("ab,bc", x, w)),
    "einsum, a list": ((5, 6), (6, 4), lambda x, w: torch.einsum("ab,bc->ac", [x, w])),
    "tensordot": ((2, 5, 6), (6, 4), lambda x, w: torch.tensordot(x, w, dims=1)),
    "tensordot, named": ((2, 6, 5), (4, 6), lambda x, w: torch.tensordot(x, w, dims=([1], [1]))),
    "tensordot, weight first": ((2, 6, 5), (4, 6), lambda x, w: torch.tensordot(w, x, dims=([-1], [-2]))),
    "1 × 1, no batch": ((6, 5), (4, 6, 1), lambda x, w: F.conv1d(x, w)),
}
STACKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Operation]] = {
    "bmm": ((3, 5, 6), (3, 6, 4), lambda x, w: torch.bmm(x, w)),
    "bmm, transposed": ((3, 5, 6), (3, 4, 6), lambda x, w: x.bmm(w.transpose(1, 2))),
    "matmul": ((3, 5, 6), (3, 6, 4), lambda x, w: x @ w),
    "broadcast": ((5, 6), (3, 6, 4), lambda x, w: x @ w),
    "weight first": ((3, 6, 5), (3, 4, 6), lambda x, w: w @ x),
    "einsum": ((3, 5, 6), (3, 6, 4), lambda x, w: torch.einsum("end,edk->enk", x, w)),
    "einsum, expert inside": ((5, 3, 6), (3, 4, 6), lambda x, w: torch.einsum("ned,ekd->nek", x, w)),
    "einsum, one input": ((5, 6), (3, 6, 4), lambda x, w: torch.einsum("nd,edk->nek", x, w)),
}
if hasattr(F, "grouped_mm"):
    OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
    STACKS["grouped"] = ((5, 8), (3, 8, 4), lambda x, w: F.grouped_mm(x, w, offs=OFFSETS))
NONE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Operation]] = {
    "two computed": ((5, 6), (6, 4), lambda x, w: x @ x.T),
    "two parameters": ((5, 6), (6, 4), lambda x, w: w @ w.T),
    "computed weight": ((5, 6), (6, 4), lambda x, w: x @ (2 * w)),
    "heads": ((5, 2, 3), (2, 3, 4), lambda x, w: torch.einsum("nhd,hdk->nk", x, w)),
    "diagonal": ((5, 6), (6, 6), lambda x, w: torch.einsum("nd,dd->nd", x, w)),
    "summed": ((5, 6), (6, 4), lambda x, w: torch.einsum("nd,dk->k", x, w)),
    "two axes": ((5, 6, 2), (6, 2, 4), lambda x, w: torch.tensordot(x, w, dims=2)),
    "scaled": ((5, 6), (6, 4), lambda x, w: torch.addmm(x.new_zeros(4), x, w, alpha=2.0)),
    "a stream is added": ((5, 6), (6, 4), lambda x, w: torch.addmm(x.new_ones(5, 4), x, w)),
    "elementwise": ((5, 6), (5, 6), lambda x, w: x * w + w),
}


class Holder(nn.Module):
    """A module that holds the parameter."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def seen(operation: Operation, x: Tensor, model: Holder) -> list[LinearCall]:
    calls: list[LinearCall] = []
    with torch.no_grad(), watch_linears(calls.append):  # type: ignore[arg-type]
        operation(x, model.weight)
    return calls


def as_numpy(call: LinearCall) -> np.ndarray:
    """input · weight, of a weight as (d, k)."""
    weight = call.weight.detach().double().numpy()
    weight = weight.reshape(weight.shape[:2])  # a 1 × 1 convolution
    return call.input.detach().double().numpy() @ (weight if call.transposed else weight.T)


@pytest.mark.parametrize("what", [*ONE, *(f"stack: {name}" for name in STACKS)])
def test_read(what: str) -> None:
    """The calls compute what the operation does; a change of the map shows in it; each is found as parameter and expert."""
    stack = what.startswith("stack: ")
    shape, of_weight, operation = STACKS[what.removeprefix("stack: ")] if stack else ONE[what]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = Holder(of_weight)
    calls = seen(operation, x, model)
    assert len(calls) == (3 if stack else 1)
    for index, call in enumerate(calls):
        np.testing.assert_allclose(call.output.detach().numpy(), as_numpy(call), atol=1e-5)
        linear = Parameters(model).find(call)
        assert linear is not None
        assert (linear.label, linear.key) == (f"weight[{index}]" if stack else "weight", call.key)
        assert linear.shape == (call.input.shape[-1], call.output.shape[-1])
        change = torch.randn(linear.shape, generator=torch.Generator().manual_seed(index + 2), dtype=torch.float64)
        linear.add(change, torch.zeros(linear.shape[1]))
        after = seen(operation, x, model)
        moved = after[index].output - call.output
        np.testing.assert_allclose(moved.detach().numpy(), call.input.double().numpy() @ change.numpy(), atol=1e-4)
        for other in set(range(len(calls))) - {index}:
            assert Parameters(model).find(after[other]).index == other  # type: ignore[union-attr]


@pytest.mark.parametrize("what", [*ONE, *(f"stack: {name}" for name in STACKS)])
def test_replaced(what: str) -> None:
    """What the watcher returns takes the output's place, in the operation's own layout."""
    shape, of_weight, operation = STACKS[what.removeprefix("stack: ")] if what.startswith("stack: ") else ONE[what]
    x, model = torch.randn(shape, generator=torch.Generator().manual_seed(0)), Holder(of_weight)
    with torch.no_grad():
        plain = operation(x, model.weight)
        with watch_linears(lambda call: call.output.clone()):
            same = operation(x, model.weight)
        with watch_linears(lambda call: call.output * torch.arange(1.0, call.output.shape[-1] + 1)):
            scaled = operation(x, model.weight)
    assert torch.equal(same, plain)
    factors = (scaled / plain).round()
    assert scaled.shape == plain.shape
    assert factors.unique().tolist() == list(range(1, 7 if "square" in what else 5))


@pytest.mark.parametrize("what", NONE)
def test_not_read(what: str) -> None:
    shape, of_weight, operation = NONE[what]
    assert seen(operation, torch.randn(shape), Holder(of_weight)) == []
