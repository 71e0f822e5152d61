"""What the blocks of a chain are called with besides the hidden state, from a forward pass that runs none of them.

The first block's hidden state is real. What a skipped block puts out has a shape and no values: whoever looks at these ends
the pass, so that what the later blocks get is shown not to depend on any hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..._compat import pytree
from ...measurement.towers import Towers
from ...structure.autocast import Autocast
from ...structure.block_source import skipping
from ...structure.hooks import Hooks
from .blocks import has_mark, hidden_in, without_hidden
from .capture import Call, Reached, Sample, kept
from .chains import Chain

_KNOWN = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad", "grad_fn", "is_leaf")
)
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}


class LookedAtError(Exception):
    """The model does something with a hidden state between blocks. Never leaves the package."""


class _Unknown(Tensor):
    """A hidden state that was not computed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _KNOWN:
            raise LookedAtError(getattr(func, "__name__", func))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def can_be_skipped(calls: Sequence[Call], samples: Sequence[Sample | None]) -> bool:
    """Whether each block got a hidden state, and put out one tensor, like the hidden state that the first one got."""
    first = calls[0].hidden
    return (
        first is not None
        and all(has_mark(call.arguments) for call in calls[1:])
        and all(s is not None and s.around is not None for s in samples)
        and {(s.shape, s.dtype, s.device) for s in samples if s is not None} == {(first.shape, first.dtype, first.device)}
    )


def capture_skipping(
    model: nn.Module, chain: Chain, forward: Callable[[], Any], towers: Towers, samples: Sequence[Sample | None]
) -> list[Call]:
    """The calls of the chain's blocks, as `capture` gives them, all but the first without a hidden state.

    Args:
        samples: of the blocks' outputs in another forward pass, which `can_be_skipped` has seen.

    Raises:
        LookedAtError: the calls depend on hidden states, or the blocks are not those of the chain.
    """
    modules, calls = dict(model.named_modules()), list[Call]()
    around = {name: sample.around for name, sample in zip(chain.blocks, samples, strict=True) if sample is not None}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_in(args, kwargs)
        unknown = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _Unknown)]
        if name != chain.blocks[len(calls)] or hidden is None or len(unknown) != bool(calls):
            raise LookedAtError(name)
        if calls and hidden is not unknown[0]:
            raise LookedAtError(name)
        arguments = without_hidden((args, kwargs))[0] if calls else (args, kwargs)
        tower = towers.current
        calls.append(Call(kept(*arguments), Autocast.now(module), tower.mask, tower.mixed))
        if len(calls) == len(chain.blocks):
            raise Reached

    def skip(name: str, *args: Any, **kwargs: Any) -> Any:
        hidden, make = hidden_in(args, kwargs), around[name]
        assert hidden is not None
        assert make is not None
        return make(hidden if isinstance(hidden, _Unknown) else hidden.detach().as_subclass(_Unknown))

    stubs = {modules[name]: partial(skip, name) for name in chain.blocks[:-1]}
    with Hooks() as hooks, _forwards(stubs), skipping(model, [modules[name] for name in chain.blocks]), suppress(Reached):
        for name in chain.blocks:
            hooks.before(modules[name], partial(keep, name))
        forward()
    if len(calls) != len(chain.blocks):
        raise LookedAtError(f"{len(calls)} of {len(chain.blocks)} blocks")
    return calls


@contextmanager
def _forwards(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, the modules run these instead of their forwards."""
    before = {module: vars(module).get("forward") for module in stubs}
    try:
        for module, stub in stubs.items():
            vars(module)["forward"] = stub
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
