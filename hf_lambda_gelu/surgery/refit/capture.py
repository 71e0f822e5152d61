"""The calls of a chain's blocks in a forward pass, and such a call made again apart from the pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ...measurement.towers import Chosen, Tower, Towers
from ...structure.autocast import Autocast
from ...structure.hooks import Hooks
from .blocks import Arguments, hidden_in, hidden_of, hidden_place, is_whole, with_hidden, without_hidden
from .chains import Chain

# elements of a block's output that are kept, to know it again by
_SAMPLE = 1024
# ‖replayed − seen‖ / ‖seen‖ of the sample, from a block that computes the same again; sums may be rounded otherwise
_SAME = {torch.float16: 1e-4, torch.bfloat16: 1e-4}
_SAME_FP32 = 1e-5


@dataclass(frozen=True)
class Call:
    """One call of a block, as the model's forward made it.

    Attributes:
        arguments: what it was called with.
        autocast: the state of autocast in which it was called: accelerate wraps the model's forward, not its blocks.
        mask, mixed: those of its tower.
        chosen: which tokens it gets, if those are a choice (an expert's).
    """

    arguments: Arguments
    autocast: Autocast
    mask: Tensor | None
    mixed: bool = False
    chosen: Chosen | None = None

    @property
    def parts(self) -> tuple[Arguments, Autocast, Tensor | None, bool, Chosen | None]:
        """What the call is made of, in order, for a store of nested tuples."""
        return self.arguments, self.autocast, self.mask, self.mixed, self.chosen

    @property
    def hidden(self) -> Tensor | None:
        """The hidden state that went in."""
        return hidden_in(*self.arguments)

    def without_hidden(self) -> Call:
        """The call with a mark in place of the hidden state."""
        return replace(self, arguments=without_hidden(self.arguments)[0])

    def with_hidden(self, hidden: Tensor) -> Call:
        """The call with `hidden` where the mark is."""
        return replace(self, arguments=with_hidden(self.arguments, hidden))

    def tower(self, size: int) -> Tower:
        """The tower, in a batch of so many examples."""
        return Tower(size, self.mask, self.mixed)

    def has_all_rows(self, size: int) -> bool:
        """Whether the hidden state has rows for all of the batch's examples: an expert gets those routed to it alone."""
        shape = () if self.hidden is None else self.hidden.shape
        if len(shape) == 2:
            told = [] if self.mask is None else [self.mask.numel(), int(self.mask.sum())]
            return shape[0] in (size, *told) or (size > 1 and shape[0] % size == 0)
        return len(shape) > 2 and (shape[0] % size == 0 or shape[1] == size or shape[0] == 1)

    def run(self, block: nn.Module) -> Any:
        """Call the block again."""
        with self.autocast.entered():
            return block(*self.arguments[0], **self.arguments[1])


@dataclass(frozen=True)
class Sample:
    """Some elements of a block's output, by which it is known again.

    Attributes:
        shape, dtype: of the output.
        values: at most 1024 of its elements, evenly spaced, fp64 on the CPU.
    """

    shape: torch.Size
    dtype: torch.dtype
    values: Tensor

    @classmethod
    def of(cls, output: Tensor | None) -> Sample | None:
        if output is None:
            return None
        flat = output.detach().reshape(-1)
        step = max(1, len(flat) // _SAMPLE)
        return cls(output.shape, output.dtype, flat[::step].to("cpu", copy=True).double())

    def matches(self, other: Sample | None) -> bool:
        """Whether the other is of the same output, but for rounding."""
        if other is None or (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        finite = torch.isfinite(self.values)
        if not torch.equal(finite, torch.isfinite(other.values)):
            return False
        apart = float((self.values - other.values)[finite].norm())
        return apart <= _SAME.get(self.dtype, _SAME_FP32) * float(self.values[finite].norm())


class _Reached(Exception):
    """Ends a forward pass early; never leaves this module."""


def capture(
    model: nn.Module, chain: Chain, forward: Callable[[], Any], towers: Towers | None = None, outputs: bool = False
) -> tuple[list[str], list[Call], list[Sample | None]]:
    """The calls of the chain's blocks in a forward pass, in order. Of several blocks the pass ends with the last.

    Args:
        towers: knows the masks of what runs, if `forward` lets it follow.
        outputs: whether the last block runs to its end too.

    Returns:
        The names of the blocks that were called, the calls, and samples of what the blocks put out.
    """
    names: list[str] = []
    calls: list[Call] = []
    samples: list[Sample | None] = []
    places: list[int] = []  # of the calls that have not ended yet
    modules = dict(model.named_modules())

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_in(args, kwargs)
        tower = Tower(1) if towers is None else towers.current
        chosen = None if towers is None or hidden is None else towers.chosen(hidden)
        places.append(len(calls))
        names.append(name)
        call = Call((args, kwargs), Autocast.now(module), tower.mask, tower.mixed, chosen)
        several = len(chain.blocks) > 1 and len(calls) > 0 and hidden is not None
        # of several blocks, the hidden state of the first is enough
        calls.append(_kept(call.without_hidden()) if several else _kept(call))
        samples.append(None)
        if not outputs:
            stop()

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        samples[places.pop()] = Sample.of(hidden_of(output)) if outputs else None
        if outputs:
            stop()

    def stop() -> None:
        if len(calls) == len(chain.blocks) and not chain.pooled and len(chain.blocks) > 1:
            raise _Reached

    with Hooks() as hooks, contextlib.suppress(_Reached):
        for name in chain.blocks:
            hooks.before(modules[name], partial(keep, name))
            hooks.after(modules[name], end)
        forward()
    return names, calls, samples


def _kept(call: Call) -> Call:
    """The call with its arguments as they are now: blocks write into their hidden state, and into caches."""
    args, kwargs = call.arguments
    place = hidden_place(args, kwargs) if is_whole(call.arguments) else None
    kept_args = tuple(_own(value, index == place) for index, value in enumerate(args))
    return replace(call, arguments=(kept_args, {name: _own(value, name == place) for name, value in kwargs.items()}))


def _own(value: Any, hidden: bool) -> Any:
    if hidden:
        return value.detach().clone()
    return None if isinstance(value, Cache) else value
