"""Which numbers in a config are the widths of feed-forward blocks: found by building the model's class again, one wider."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import owner_of
from .config_probe import config_places
from .feed_forward import FeedForward
from .modules import transformers_parts

# words in the names of widths that a config leaves to a default (GPT-2's `n_inner`)
_WORDS = ("inner", "ffn", "intermediate")
# words in the names of what a width is a multiple of the hidden size by (DINOv2's and Swin's `mlp_ratio`)
_RATIO_WORDS = ("ratio", "mult", "expansion")


@dataclass(frozen=True)
class Width:
    """A number in a config, and the blocks whose width it is.

    Attributes:
        path: the attribute as a dotted path from the config, e.g. "text_config.intermediate_size".
        value: the width, also where the config leaves it to a default; of a ratio, the ratio.
        sites: of the blocks.
        obstacle: why it cannot be changed: something else is as wide; empty if it can.
        ratio: whether each block is so many times as wide as its input, and not so wide.
    """

    path: str
    value: int | float
    sites: tuple[str, ...]
    obstacle: str = ""
    ratio: bool = False


def widths(part: PreTrainedModel, blocks: Mapping[str, FeedForward], ratios: bool = False) -> list[Width]:
    """The widths of these blocks, which are in `part`, as its config has them; each block in one of them at most.

    Args:
        ratios: whether to look for ratios too, for blocks that no width was found for.
    """
    found: list[Width] = []
    free = dict(blocks)
    candidates: list[tuple[str, int | float, bool]] = []
    candidates += [(path, value, False) for path, value in _candidates(part.config, {b.units for b in blocks.values()})]
    candidates += [(path, value, True) for path, value in _ratios(part.config)] if ratios else []
    for path, value, ratio in candidates:
        rebuilt = rebuild(part, path, 2 * value if ratio else value + 1) if free else None
        width = None if rebuilt is None else _width(part, rebuilt, path, value, free, ratio)
        if width is not None:
            found.append(width)
            free = {name: block for name, block in free.items() if name not in width.sites}
    return found


def _ratios(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _ratios(value, f"{prefix}{name}.")
        elif type(value) in (int, float) and any(word in name for word in _RATIO_WORDS):
            yield f"{prefix}{name}", value


def _candidates(config: PreTrainedConfig, values: set[int], prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _candidates(value, values, f"{prefix}{name}.")
        elif type(value) is int and value in values:
            yield f"{prefix}{name}", value
        elif value is None and any(word in name for word in _WORDS):
            yield from ((f"{prefix}{name}", width) for width in sorted(values))


def _width(
    part: PreTrainedModel,
    rebuilt: PreTrainedModel,
    path: str,
    value: int | float,
    blocks: Mapping[str, FeedForward],
    ratio: bool,
) -> Width | None:
    """The blocks that are one wider in `rebuilt`, or twice as wide, and nothing else of them changed; None without one."""
    names = {parameter: name for name, parameter in part.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in rebuilt.named_parameters()}
    group, explained = [], set()
    for site, block in blocks.items():
        wider = {}
        for side in block.parameters:
            wider[names[side.parameter]] = side.shape(2 * block.units if ratio else block.units + 1)
        if (ratio or block.units == value) and all(shapes.get(name) == shape for name, shape in wider.items()):
            group.append(site)
            explained |= set(wider)
    if not group:
        return None
    others = [n for p, n in names.items() if n not in explained and shapes.get(n) != tuple(p.shape)]
    if not others and not ratio:  # what is made of the number by a division may stay at one more (VideoPrism's head)
        doubled = rebuild(part, path, 2 * value)
        shapes = {} if doubled is None else {name: tuple(parameter.shape) for name, parameter in doubled.named_parameters()}
        others = [n for p, n in names.items() if n not in explained and shapes.get(n, tuple(p.shape)) != tuple(p.shape)]
    obstacle = f"config.{path} is the width of {others[0]} too, in no block that can be told" if others else ""
    return Width(path, value, tuple(group), obstacle, ratio)


def rebuild(part: PreTrainedModel, path: str | None = None, value: int | float = 0) -> PreTrainedModel | None:
    """What stock transformers builds from the config, with another value at `path`, on the meta device; None if nothing."""
    config = copy.deepcopy(part.config)
    if path is not None:
        owner, leaf = owner_of(config, path)
        setattr(owner, leaf, value)
    try:
        config = type(config).from_dict(config.to_dict())  # as it is after a reload
        with torch.device("meta"), torch.random.fork_rng(devices=()):
            return type(part)(config)
    except (MemoryError, OSError):  # says nothing of the class
        raise
    except Exception:  # a class that does not take the value
        return None


def following(part: PreTrainedModel, wider: PreTrainedModel) -> Iterator[tuple[str, str, int, int]]:
    """(module, attribute, number now, number then) of what modules took from the config, and `wider` has otherwise."""
    now = rebuild(part)
    if now is None:
        return
    built, own = dict(now.named_modules()), dict(part.named_modules())
    for name, module in wider.named_modules():
        for attribute, then in list(vars(module).items()):
            before = vars(built[name]).get(attribute) if name in built else None
            held = vars(own[name]).get(attribute) if name in own else None
            if type(then) is type(before) is type(held) is int and then != before == held:
                yield name, attribute, held, then


def set_width(part: PreTrainedModel, width: Width, value: int | float) -> None:
    """Let the config and the copies that modules hold have this value, and numbers that modules took from it.

    The part must have a config of its own. Which configs and numbers these are is seen in a model that is built with the
    value one larger.
    """
    wider = rebuild(part, width.path, width.value + 1)
    owner, leaf = owner_of(part.config, width.path)
    setattr(owner, leaf, value)
    if wider is None:
        return
    own = dict(config_places(part, leaf))
    for place, config in config_places(wider, leaf):
        if getattr(config, leaf) == width.value + 1 and place in own:
            setattr(own[place], leaf, value)
    modules: dict[str, nn.Module] = dict(part.named_modules())
    for name, module in wider.named_modules():
        for attribute, number in list(vars(module).items()):
            held = vars(modules[name]).get(attribute) if name in modules else None
            if type(number) is int and number == width.value + 1 and type(held) is int and held == width.value:
                setattr(modules[name], attribute, value)


def misfit(model: nn.Module, parameters: Collection[nn.Parameter]) -> str | None:
    """What stock transformers would build otherwise, of these parameters, from the configs; None if nothing."""
    for part in transformers_parts(model).values():
        rebuilt = rebuild(part)
        shapes = {} if rebuilt is None else {name: tuple(p.shape) for name, p in rebuilt.named_parameters()}
        for name, parameter in part.named_parameters():
            if parameter in parameters and shapes.get(name) != tuple(parameter.shape):
                return (
                    f"{name} would be {tuple(parameter.shape)}, and stock transformers would build {shapes.get(name)} from "
                    "the config. The model is as it was"
                )
    return None
