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
from .blocks import Arguments, has_mark, hidden_in, hidden_of, hidden_place, with_hidden, without_hidden
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
        """The call with a mark in place of the hidden state, if that is there."""
        return self if has_mark(self.arguments) else replace(self, arguments=without_hidden(self.arguments)[0])

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
        shape, dtype, device: of the output.
        values: at most 1024 of its elements, evenly spaced, fp64 on the CPU; None if no values are known.
        around: makes of a hidden state what the block returns; None if that holds more than the hidden state.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    values: Tensor | None = None
    around: Callable[[Tensor], Any] | None = None

    @classmethod
    def of(cls, output: Any) -> Sample | None:
        hidden = hidden_of(output)
        if hidden is None:
            return None
        flat = hidden.detach().reshape(-1)
        step = max(1, len(flat) // _SAMPLE)
        values = flat[::step].to("cpu", copy=True).double()
        return cls(hidden.shape, hidden.dtype, hidden.device, values, _around(output))

    def matches(self, other: Sample | None) -> bool:
        """Whether the other is of the same output, but for rounding, as far as values of both are known."""
        if other is None or (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if self.values is None or other.values is None:
            return True
        finite = torch.isfinite(self.values)
        if not torch.equal(finite, torch.isfinite(other.values)):
            return False
        apart = float((self.values - other.values)[finite].norm())
        return apart <= _SAME.get(self.dtype, _SAME_FP32) * float(self.values[finite].norm())


def _around(output: Any) -> Callable[[Tensor], Any] | None:
    if isinstance(output, Tensor):
        return _alone
    if type(output) in (tuple, list) and all(other is None for other in output[1:]):
        return partial(_first_of, type(output), len(output))
    return None


def _alone(hidden: Tensor) -> Tensor:
    return hidden


def _first_of(kind: type, length: int, hidden: Tensor) -> Any:
    return kind([hidden, *[None] * (length - 1)])


class Reached(Exception):
    """Ends a forward pass early. Never leaves the package."""


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
        arguments: Arguments = (args, kwargs)
        if len(chain.blocks) > 1 and calls and hidden is not None:  # of several blocks, that of the first is enough
            arguments = without_hidden(arguments)[0]
        calls.append(Call(kept(*arguments), Autocast.now(module), tower.mask, tower.mixed, chosen))
        samples.append(None)
        if not outputs:
            stop()

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        samples[places.pop()] = Sample.of(output) if outputs else None
        if outputs:
            stop()

    def stop() -> None:
        if len(calls) == len(chain.blocks) and not chain.pooled and len(chain.blocks) > 1:
            raise Reached

    with Hooks() as hooks, contextlib.suppress(Reached):
        for name in chain.blocks:
            hooks.before(modules[name], partial(keep, name))
            hooks.after(modules[name], end)
        forward()
    return names, calls, samples


def kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments as they are now: blocks write into their hidden state, and into caches."""
    place = None if has_mark((args, kwargs)) else hidden_place(args, kwargs)
    own_args = tuple(_own(value, index == place) for index, value in enumerate(args))
    return own_args, {name: _own(value, name == place) for name, value in kwargs.items()}


def _own(value: Any, hidden: bool) -> Any:
    if hidden:
        return value.detach().clone()
    return None if isinstance(value, Cache) else value
