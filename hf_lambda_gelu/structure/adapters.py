"""What PEFT puts into a model, or before it: whether there is something, where, and what it stands around."""

from __future__ import annotations

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
        if is_of_peft(module):
            return f"{name or 'the model'} is PEFT's {type(module).__name__}"
    return None


def is_of_peft(module: nn.Module) -> bool:
    """Whether the module is of a class of PEFT's, or of one derived from it."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)
