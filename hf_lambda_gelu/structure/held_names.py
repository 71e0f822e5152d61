"""Under which names a model holds what its class builds, where other modules stand around parts of it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .adapters import is_of_peft

# what torch.compile and activation checkpointing put around a block
_OF_TORCH = ("_orig_mod", "_checkpoint_wrapped_module")


def held_names(model: nn.Module, built: Iterable[str]) -> list[str]:
    """The names under which the model holds what its class builds as `built`, within what PEFT or torch put around it.

    Of what an adapter trains whole, `modules_to_save`, that is the original and a copy for each adapter.
    """
    names = list(built)
    for wrapper, module in model.named_modules():
        inside = _held_inside(module)
        if inside:
            names = [
                held
                for name in names
                for held in (
                    [f"{wrapper}.{place}{name.removeprefix(wrapper)}" for place in inside]
                    if name.startswith(f"{wrapper}.")
                    else [name]
                )
            ]
    return names


def _held_inside(module: nn.Module) -> list[str]:
    """Where a module of PEFT's or torch's holds the one in whose place it stands; none of another module."""
    children = dict(module.named_children())
    if not is_of_peft(module):
        return [name for name in children if name in _OF_TORCH]
    copies = children.get("modules_to_save")
    if isinstance(copies, nn.ModuleDict):
        return ["original_module", *(f"modules_to_save.{adapter}" for adapter in copies)]
    return [name for name in children if name == "base_layer"]
