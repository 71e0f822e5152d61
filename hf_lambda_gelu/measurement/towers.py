"""Follows a forward pass through a model's towers (encoder, decoder, text, images): which mask belongs to what runs now.

A mask belongs to the module that is called with it and to what runs inside, until a module inside gets inputs of its own:
an image tower, called with pixels and no mask, is not masked by the text's, whatever the sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..structure.config import config_of
from ..structure.hooks import Hooks
from .audio_masks import frame_mask
from .chosen_rows import chosen_rows

# what a tower is called with; a call with one of these and no mask has no padding
_PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "input_features",
    "input_values",
    "query_embeds",
    "flattened_patches",
    "decoder_input_ids",
    *_PIXELS,
)
_MASKS = ("attention_mask", "padding_mask")
_INVERTED_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")  # torch's: True at padding
_MASKED_OUT = -1e3  # additive masks hold 0, and for padding −1e4 or less

Leading = tuple[int, ...]
Chosen = tuple[Tensor, int]  # which of all tokens (n,), and how many there are


@dataclass(frozen=True)
class Tower:
    """What is known of the positions on which a module works.

    Attributes:
        size: examples in the model's batch.
        mask: (size · k, positions), True at tokens; None where nothing is padding.
        mixed: whether text and something else come together here, so that the mask may or may not be of what runs.
        frames: (positions) → the mask of so many frames that audio was resampled to, None if it is no such number.
    """

    size: int
    mask: Tensor | None = None
    mixed: bool = False
    frames: Callable[[int], Tensor | None] | None = field(default=None, compare=False)

    @property
    def padded(self) -> bool:
        """Whether anything is padding."""
        return self.mask is not None and not bool(self.mask.all())


@dataclass(frozen=True)
class Scope:
    """One call of a module: its tower, and the leading shape of its hidden state, None without one."""

    number: int
    tower: Tower
    leading: Leading | None


@dataclass(frozen=True)
class Note:
    """Where a tensor was seen.

    Attributes:
        leading: its shape but for the features.
        tower: the tower that it is in.
        scopes: the calls of modules around it, inner ones first.
        chosen: of rows that are a choice of all tokens (an expert's), which those are, and how many tokens there are.
    """

    leading: Leading
    tower: Tower
    scopes: tuple[Scope, ...]
    chosen: Chosen | None = None


class Towers:
    """Knows, at any point of a forward pass within `following`, what belongs to it.

    Args:
        model: whose forward is followed.
        inner: modules of it; the ones around them are watched.
    """

    def __init__(self, model: nn.Module, inner: Iterable[nn.Module]) -> None:
        self.model = model
        self._around = _modules_around(model, inner)
        self._names = {module: _argument_names(module) for module in self._around}
        self._decoder = _decoder_modules(model)
        self._scopes: list[Scope] = []
        self._hidden: list[Tensor | None] = []  # what the modules in the scopes were called with
        self._base = Tower(1)
        self._base_chosen: Chosen | None = None
        self._decoder_mask: Tensor | None = None
        self._count = 0

    @contextmanager
    def following(
        self,
        size: int,
        batch: Mapping[str, Any] | None = None,
        base: Tower | None = None,
        chosen: Chosen | None = None,
        root: nn.Module | None = None,
    ) -> Iterator[None]:
        """Within the block, one forward pass runs.

        Args:
            size: examples in the batch.
            batch: the model's; from its labels follows the decoder's padding where no mask says it.
            base, chosen: the tower of what runs, where that is not the whole model, and which tokens it gets.
            root: the module that runs, if it is not the whole model.
        """
        self._base = Tower(size) if base is None else base
        self._base_chosen = chosen
        self._decoder_mask = None if batch is None else decoder_mask(self.model, batch)
        self._scopes, self._hidden = [], []
        inside = None if root is None else set(root.modules())
        with Hooks() as hooks:
            for module in self._around:
                if inside is None or module in inside:
                    hooks.before(module, partial(self._enter, self._names[module]))
                    hooks.after(module, self._leave)
            yield

    @property
    def current(self) -> Tower:
        """The tower of what runs now."""
        return self._scopes[-1].tower if self._scopes else self._base

    def note(self, tensor: Tensor) -> Note:
        """Where this tensor, channels last, is seen."""
        leading = tuple(tensor.shape[:-1])
        return Note(leading, self.current, tuple(reversed(self._scopes)), self._chosen(leading))

    def chosen(self, rows: Tensor) -> Chosen | None:
        """Where rows (n, d) of a choice of tokens, an expert's, come from: what the modules around were called with."""
        if rows.dim() != 2 or len(rows) in (self._base.size, _tokens(self.current)):
            return None
        around = [_flat(hidden) for hidden in reversed(self._hidden) if hidden is not None]
        for whole in around:
            if len(whole) > len(rows) and len(whole) % self._base.size == 0 and whole.shape[-1] == rows.shape[-1]:
                found = chosen_rows(rows, whole)
                if found is not None:
                    return found.cpu(), len(whole)
        return None

    def _chosen(self, leading: Leading) -> Chosen | None:
        """That of a tensor of so many rows: the module around it that was called with as many."""
        if len(leading) != 1:
            return None
        if self._base_chosen is not None and len(self._base_chosen[0]) == leading[0]:
            return self._base_chosen
        inner = next((h for h in reversed(self._hidden) if h is not None and h.dim() == 2 and len(h) == leading[0]), None)
        return None if inner is None else self.chosen(inner)

    def _enter(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = next((v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)
        leading = None if hidden is None else tuple(hidden.shape[:-1])
        self._count += 1
        self._scopes.append(Scope(self._count, self._tower(module, given), leading))
        self._hidden.append(hidden)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._scopes:
            self._scopes.pop()
            self._hidden.pop()

    def _tower(self, module: nn.Module, given: Mapping[str, Any]) -> Tower:
        size = self._base.size
        if "decoder_input_ids" in self._names[module]:  # what is around both has its heads after the decoder
            return Tower(size, self._decoder_mask)
        mask = next((m for m in map(partial(key_mask, given, size), (*_MASKS, *_INVERTED_MASKS)) if m is not None), None)
        if mask is not None:
            mask = _without_past(mask, given)
            return Tower(size, mask, _is_mixed(given), partial(frame_mask, self.model, mask))
        if self.current.mixed and any(_is_of(given.get(name), self.current.mask) for name in _MASKS):
            return replace(self.current, mixed=False)
        whole = isinstance(module, PreTrainedModel)
        starts = any(given.get(name) is not None for name in (_INPUTS if whole else _PIXELS))
        starts = starts or (whole and self.current.mixed)  # beside text, what is called without a mask is not the text's
        if starts and not any(given.get(name) is not None for name in _MASKS):
            return Tower(size, self._decoder_mask if module in self._decoder else None)
        return self.current


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _tokens(tower: Tower) -> int | None:
    return None if tower.mask is None else tower.mask.numel()


def _is_mixed(given: Mapping[str, Any]) -> bool:
    """Whether a module is called with text and with images or sounds: what runs inside may be of either."""
    text, others = ("input_ids", "inputs_embeds"), ("input_features", "input_values", *_PIXELS)
    return all(any(given.get(name) is not None for name in names) for names in (text, others))


def _without_past(mask: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The mask of what runs: with a key-value cache (prefix tuning) it covers the cached positions before them too."""
    present = next(
        (v for n in ("input_ids", "inputs_embeds") if isinstance(v := given.get(n), Tensor) and v.dim() > 1), None
    )
    if given.get("past_key_values") is None or present is None or present.shape[1] >= mask.shape[1]:
        return mask
    return mask[:, -present.shape[1] :]


def decoder_mask(model: nn.Module | None, batch: Mapping[str, Any]) -> Tensor | None:
    """(batch, length), True where the decoder's input is no padding; None if the batch does not say.

    It is the decoder's mask, or else follows from labels, which are −100 at the end of an example, or else from the pad
    tokens at the end of the decoder's input: a decoder input that is made from labels is the labels shifted by one.
    """
    mask, labels, ids = (batch.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    if isinstance(labels, Tensor) and labels.dim() == 2 and (not isinstance(ids, Tensor) or ids.shape == labels.shape):
        return ~_at_the_end(labels == -100)
    pad = None if model is None else getattr(config_of(model), "pad_token_id", None)
    if isinstance(ids, Tensor) and ids.dim() == 2 and isinstance(pad, int):
        ends = _at_the_end(ids == pad)
        ends[:, :1] = False  # T5 starts with its pad token
        return ~ends
    return None


def _at_the_end(marked: Tensor) -> Tensor:
    """Of (batch, length), True where all from here to the end are marked."""
    return marked.flip(1).int().cumprod(1).flip(1).bool()


def key_mask(given: Mapping[str, Any], size: int, name: str) -> Tensor | None:
    """The padding mask of that name, (batch, length), True at tokens; None if there is none or it is of another kind."""
    mask = given.get(name)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4 and mask.numel() and bool((mask == mask[:, :1, :1]).all()):  # for every head and query alike
        mask = mask[:, 0, 0]
        mask = mask > _MASKED_OUT if mask.is_floating_point() else mask != 0
    elif mask.dim() != 2:
        return None
    elif mask.is_floating_point() and (bool((mask < 0).any()) or not bool(mask.any())):  # additive (Longformer)
        mask = mask > _MASKED_OUT
    elif mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        return None
    if not len(mask) or len(mask) % size:
        return None
    return mask == 0 if name in _INVERTED_MASKS else mask != 0


def _is_of(attention: object, mask: Tensor | None) -> bool:
    """Whether the queries attend, all together, to the keys that are tokens by the mask, and to no others.

    Queries of padding that attend to everything are left out: transformers writes that where they would attend to nothing.
    """
    if not isinstance(attention, Tensor) or mask is None or attention.dim() != 4:
        return False
    if len(attention) != len(mask) or attention.shape[-2:] != (mask.shape[1], mask.shape[1]):
        return False
    allowed = attention > _MASKED_OUT if attention.is_floating_point() else attention != 0
    allowed = allowed.any(1)
    return torch.equal((allowed & (mask | ~allowed.all(-1))[:, :, None]).any(1), mask)


def _modules_around(model: nn.Module, inner: Iterable[nn.Module]) -> list[nn.Module]:
    wanted = set(inner)
    return [module for module in model.modules() if module not in wanted and not wanted.isdisjoint(module.modules())]


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward in C
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _decoder_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of the decoders of encoder-decoder models, wherever they are in the model; none in others."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "decoder_input_ids" in _argument_names(module):
            decoder: nn.Module | None = module.get_decoder()
            if decoder is not None and decoder is not module:  # itself: transformers found none
                found |= set(decoder.modules())
    return found
