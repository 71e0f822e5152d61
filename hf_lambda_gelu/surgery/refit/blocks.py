"""The arguments that a block of the network is called with, and the hidden state among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hidden_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a block's hidden state is among its arguments: the first floating point tensor."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return index
    return next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A block's hidden state going in: the first floating point tensor among its arguments."""
    place = hidden_place(args, kwargs)
    hidden: Tensor | None = args[place] if isinstance(place, int) else None if place is None else kwargs[place]
    return hidden


def hidden_of(output: Any) -> Tensor | None:
    """A block's output, or the first of several."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


class _Hidden:
    """Stands where the hidden state goes."""


_HIDDEN = _Hidden()


def without_hidden(arguments: Arguments) -> tuple[Arguments, Tensor]:
    """The arguments with a mark in place of the hidden state, and the hidden state."""
    args, kwargs = list(arguments[0]), dict(arguments[1])
    place = hidden_place(*arguments)
    if place is None:
        raise ValueError("a block without a floating point input has no hidden state")
    owner: Any = args if isinstance(place, int) else kwargs
    hidden, owner[place] = owner[place], _HIDDEN
    return (tuple(args), kwargs), hidden


def has_mark(arguments: Arguments) -> bool:
    """Whether a mark stands in place of the hidden state."""
    return any(value is _HIDDEN for value in (*arguments[0], *arguments[1].values()))


def with_hidden(arguments: Arguments, hidden: Tensor) -> Arguments:
    """The arguments with `hidden` where the mark is."""
    args, kwargs = arguments
    return tuple(hidden if a is _HIDDEN else a for a in args), {k: hidden if v is _HIDDEN else v for k, v in kwargs.items()}
