"""What PEFT puts into a model, or before it: whether there is something, where, and what it stands around."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model, or prompts before it: its checkpoints then hold these alone.

    Known by modules of PEFT's, however they came there: `get_peft_model`, `inject_adapter_in_model`, `add_adapter`.
    """
    return _of_peft(model) is not None


def adapted_layer(model: nn.Module) -> str | None:
    """The first layer with an adapter ("… is PEFT's Linear"); None where base weights alone compute, if behind prompts."""
    return _of_peft(model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]


def how_to_merge(model: nn.Module) -> str:
    """What to do where a model must be without adapters."""
    if hasattr(model, "merge_and_unload"):
        return "model = model.merge_and_unload() first"
    return (
        "first model = PeftModel.from_pretrained(base, folder of the adapters).merge_and_unload(). Prompts cannot be "
        "merged: do it with the base, without them, and then PeftModel.from_pretrained(base, folder of the prompts)"
    )


def _of_peft(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if _is_of_peft(module):
            return f"{name or 'the model'} is PEFT's {type(module).__name__}"
    return None


def _is_of_peft(module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def held_names(model: nn.Module, built: Iterable[str]) -> list[str]:
    """The names under which the model holds what its class builds under the names `built`, within what PEFT puts around it.

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
    """Where a module of PEFT's holds the one in whose place it stands; none of another module."""
    if not _is_of_peft(module):
        return []
    copies = dict(module.named_children()).get("modules_to_save")
    if isinstance(copies, nn.ModuleDict):
        return ["original_module", *(f"modules_to_save.{adapter}" for adapter in copies)]
    return [name for name, _ in module.named_children() if name == "base_layer"]
