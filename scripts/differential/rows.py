"""Whole-model forwards with plain hooks: what goes into a map and comes out of it, and which token each row is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from scripts.differential.conditions import Batch
from scripts.differential.decisions import Decision, Map

Array = NDArray[np.float64]
NOT_TEXT = re.compile(r"vision|visual|image|audio|speech|video|patch|pixel|qformer|projector")
EXPERT = re.compile(r"(^|\.)experts?\.")

_STACKED = (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)  # a product for each expert
_GATHERS = (Tensor.__getitem__, Tensor.index_select, torch.index_select)


@dataclass
class Seen:
    """Of one forward: the calls of each map, and what was at the meeting point after how many calls of the first map.

    Attributes:
        calls: number of the map → each call of it.
    """

    calls: dict[int, list[Call]] = field(default_factory=dict)
    stream: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Call:
    """A call of a map, channels last.

    Attributes:
        given, output: (…, d) and (…, k).
        around: the inputs of the modules around the map at that time, innermost first, and the last that linear maps got.
        gathered: (places, rows that they were taken of) of the last choice of rows by index that fits what was given.
    """

    given: Tensor
    output: Tensor
    around: list[Tensor] = field(default_factory=list)
    gathered: tuple[Tensor, int] | None = None


def _fitting(gathers: list[tuple[Tensor, int]], given: Tensor) -> tuple[Tensor, int] | None:
    """The last choice of rows that has as many as were given, or of which a part, told by its place in memory, was given."""
    if given.dim() != 2:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        width = given.shape[1]
        held = given.untyped_storage().nbytes() // given.element_size() // max(1, width)
        start = given.storage_offset() // max(1, width)
        for places, total in reversed(gathers):
            if len(places) == len(given):
                return places, total
            if len(places) == held and given.is_contiguous():
                return places[start : start + len(given)], total
    return None


class Intercept(TorchFunctionMode):
    """Sees the linear maps that are no modules of their own: those whose weight lies in one of the parameters."""

    def __init__(self, weights: dict[int, Tensor], keep: Callable[[int, Tensor, Tensor], None], rows: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.keep, self.rows = weights, keep, rows
        self.gathers: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _STACKED and isinstance(args[1], Tensor) and args[1].dim() == 3:
            with torch._C.DisableTorchFunctionSubclass():
                for number, place in self.weights.items():
                    for expert, weight in enumerate(args[1]):
                        if weight.data_ptr() == place.data_ptr() and weight.shape in (place.shape, place.T.shape):
                            self.keep(number, args[0][expert], output[expert])
        if func in _GATHERS:
            self._gathered(args)
        if func is F.linear:
            given, weight = args[0], args[1]
            with torch._C.DisableTorchFunctionSubclass():
                for number, place in self.weights.items():
                    if weight.data_ptr() == place.data_ptr() and weight.shape == place.shape:
                        self.keep(number, given, output)
                self.rows.append(given.detach())
                del self.rows[:-4]
        return output

    def _gathered(self, args: Any) -> None:
        index = args[-1][0] if isinstance(args[-1], tuple) and args[-1] else args[-1]
        if isinstance(index, Tensor) and index.dtype is torch.long and index.dim() == 1 and args[0].dim() == 2:
            with torch._C.DisableTorchFunctionSubclass():
                self.gathers.append((index.detach().cpu().clone(), len(args[0])))
                del self.gathers[:-4]


def look(run: Callable[[], Any], model: nn.Module, decision: Decision, stream: bool, grid: bool = True) -> Seen:
    """One forward with hooks on the maps alone, on the modules around them, and at the meeting point."""
    seen, handles, rows = Seen(), [], []
    entered: dict[str, Tensor] = {}
    name = decision.maps[0].weight.rpartition(".")[0]
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]

    def keep(number: int, given: Tensor, output: Tensor) -> None:
        outer = [entered[n] for n in around if n in entered]
        gathered = _fitting(intercept.gathers, given)
        seen.calls.setdefault(number, []).append(Call(given.detach(), output.detach(), [*rows, *outer], gathered))

    def enter(where: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = first_tensor(args, kwargs)
            if tensor is not None:
                entered[where] = tensor.detach()

        return hook

    def meet(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor(args, kwargs)
        if seen.calls and tensor is not None:
            seen.stream[len(seen.calls[0]) - 1] = tensor.detach().clone()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tensor = main_tensor(output)
        if seen.calls and tensor is not None:
            seen.stream[len(seen.calls[0]) - 1] = tensor.detach().clone()

    intercepted: dict[int, Tensor] = {}
    for number, linear in enumerate(decision.maps):
        owner = model.get_submodule(linear.weight.rpartition(".")[0])
        weight = model.get_parameter(linear.weight)
        if linear.index is not None or not linear.weight.endswith(".weight"):
            intercepted[number] = weight if linear.index is None else weight[linear.index]
            continue
        moved = isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

        def after(
            module: nn.Module, args: Any, output: Tensor, number: int = number, moved: bool = moved, linear: Map = linear
        ) -> None:
            given = taps(module, args[0], linear.group) if moved else args[0]
            given, output = (t.movedim(1, -1) if moved else t for t in (given, output))
            keep(number, given, output[..., linear.outputs])

        handles.append(owner.register_forward_hook(after))
    for where in around:
        handles.append(model.get_submodule(where).register_forward_pre_hook(enter(where), with_kwargs=True))
    if stream and decision.module is None:
        handles.append(model.get_submodule(decision.block).register_forward_hook(leave))
    elif stream and decision.module is not None:
        inner = f"{decision.block}.{decision.module}".strip(".")
        handles.append(model.get_submodule(inner).register_forward_pre_hook(meet, with_kwargs=True))
    intercept = Intercept(intercepted, keep, rows)
    try:
        with torch.no_grad(), intercept:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def taps(conv: Any, x: Tensor, group: int) -> Tensor:
    """(batch, d · kernel, …), what one group of a convolution multiplies at each position: one-hot kernels pick it out."""
    with torch._C.DisableTorchFunctionSubclass():
        x = x.detach().chunk(conv.groups, 1)[group]
        size = x.shape[1] * int(np.prod(conv.kernel_size))
        picks = torch.eye(size, dtype=x.dtype, device=x.device).view(size, x.shape[1], *conv.kernel_size)
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(conv.kernel_size)]
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), 0
        return convolve(x, picks, None, conv.stride, padding, conv.dilation)


def first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """The first floating point tensor among the arguments."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)


def main_tensor(output: Any) -> Tensor | None:
    """A module's output; of several the first, of a model's the logits."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        values = [output["logits"]] if "logits" in output else [v for k, v in output.items() if k != "loss"]
    else:
        values = list(output) if isinstance(output, (tuple, list)) else []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (tuple, list)) and (found := main_tensor(value)) is not None:
            return found
    return None


@contextlib.contextmanager
def gates(sites: dict[str, nn.Module], hard: set[str]) -> Iterator[None]:
    """Within the block, these sites compute max(x, 0)."""
    for name, site in sites.items():
        if name in hard:
            site.forward = F.relu  # type: ignore[method-assign]
    try:
        yield
    finally:
        for site in sites.values():
            vars(site).pop("forward", None)


# ------------------------------------------------------------------------------------------------ which token a row is


@dataclass
class Rows:
    """The rows of one map on one batch, in the order of its calls.

    Attributes:
        inputs, outputs: (rows, d) and (rows, k).
        example, token: (rows,), the example in the batch, and False where it is padding.
        told: whether padding could be told.
    """

    inputs: Tensor
    outputs: Tensor
    example: Tensor
    token: Tensor
    part: Tensor
    total: int
    told: bool = True


def rows_of(calls: list[Call], batch: Batch, linear: Map, chunked: bool, decoder: bool) -> Rows:
    """All calls of a map in one forward as rows, each with its token."""
    media = batch.tokens is None or NOT_TEXT.search(linear.weight.lower())
    mask = batch.media if media and not decoder else batch.decoder if decoder else batch.tokens
    if chunked and len(calls) > 1 and all(call.given.dim() > 2 for call in calls):
        inputs, outputs = (joined([getattr(call, name) for call in calls], batch) for name in ("given", "output"))
        calls = [Call(given, output) for given, output in zip(inputs, outputs, strict=True)]
    expert = linear.index is not None or EXPERT.search(linear.weight) is not None
    found = [_places(call, batch.size, mask, expert) for call in calls]
    given, output = (
        torch.cat([t.reshape(-1, t.shape[-1]) for t in ts]) for ts in zip(*((c.given, c.output) for c in calls), strict=True)
    )
    example, token, part = (torch.cat([f[i] for f in found]) for i in (0, 1, 2))
    return Rows(given, output, example, token, part, max(f[3] for f in found), all(f[4] for f in found))


def joined(pieces: list[Tensor], batch: Batch) -> list[Tensor]:
    """Sequences of pieces that a chunked feed-forward made of them; all in one where no text tells their length."""
    whole: list[Tensor] = []
    held: list[Tensor] = []
    for piece in pieces:
        held.append(piece)
        length = sum(part.shape[1] for part in held)
        if batch.tokens is not None and length == (batch.size if _turned(piece, batch) else batch.tokens.shape[1]):
            whole.append(torch.cat(held, 1))
            held = []
    return [*whole, torch.cat(held, 1)] if held else whole


def _turned(piece: Tensor, batch: Batch) -> bool:
    return batch.tokens is not None and piece.shape[0] == batch.tokens.shape[1] != batch.size


def _places(call: Call, size: int, mask: Tensor | None, expert: bool) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    leading = tuple(call.given.shape[:-1])
    count = int(np.prod(leading))
    plain = _laid_out(leading, size, mask)
    if call.gathered is not None and expert:
        places, total = call.gathered
        whole = _laid_out((total,), size, mask)
        if whole is not None:
            return whole[0][places], whole[1][places], places, total, True
    if plain is not None:
        return *plain, torch.arange(count), count, True
    for inner in range(len(call.around)):  # a choice of the rows of a module around
        chosen = call.around[inner]
        chosen = chosen.reshape(-1, chosen.shape[-1])
        if len(chosen) != count:
            continue
        for outer in call.around:
            whole = _laid_out(tuple(outer.shape[:-1]), size, mask)
            if whole is None or outer.shape[-1] != chosen.shape[-1]:
                continue
            same = _same_rows(chosen, outer.reshape(-1, outer.shape[-1]))
            if same is not None:
                return whole[0][same], whole[1][same], same, outer[..., 0].numel(), True
    every = torch.ones(count, dtype=torch.bool)
    if mask is not None and count == int(mask.sum()):  # the model took the padding out itself
        return mask.nonzero()[:, 0], every, torch.arange(count), count, True
    example = torch.arange(count) // (count // size) if count % size == 0 else torch.arange(count)
    return example, every, torch.arange(count), count, mask is None or bool(mask.all())


def _laid_out(leading: tuple[int, ...], size: int, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(example, token) by row of a tensor of that leading shape, if it can be told."""
    count = int(np.prod(leading))
    if len(leading) > 1 and leading[1] == size != leading[0]:  # positions first
        example = torch.arange(size).repeat_interleave(count // leading[0] // size).repeat(leading[0])
        token = torch.ones(count, dtype=torch.bool)
        if mask is not None and mask.shape[1] == leading[0]:
            token = mask.T.reshape(-1, 1).expand(-1, count // mask.numel()).reshape(-1)
        return example, token
    if mask is None or bool(mask.all()):
        return (torch.arange(count) // (count // size), torch.ones(count, dtype=torch.bool)) if count % size == 0 else None
    if leading[:2] == tuple(mask.shape):
        token = mask.reshape(-1, 1).expand(-1, count // mask.numel()).reshape(-1)
    elif leading == (mask.numel(),):
        token = mask.reshape(-1)
    else:
        return None
    return torch.arange(count) // (count // size), token


def _same_rows(chosen: Tensor, whole: Tensor) -> Tensor | None:
    """For each row the place of the row that it is a copy of; of equal ones, one after the other."""
    places, taken = [], set()
    by_value: dict[bytes, list[int]] = {}
    for place, row in enumerate(whole.float().cpu().numpy()):
        by_value.setdefault(row.tobytes(), []).append(place)
    for row in chosen.float().cpu().numpy():
        found = by_value.get(row.tobytes())
        if not found:
            return None
        place = next((p for p in found if p not in taken), found[-1])
        taken.add(place)
        places.append(place)
    return torch.tensor(places, dtype=torch.long)
