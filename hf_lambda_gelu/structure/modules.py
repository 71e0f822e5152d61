"""What a model is made of: its transformers parts, its modules by name, and which of them are activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel, activations

from ..activation.module import LambdaGELU
from .computed_base import computed_base
from .config import STOCK_KEYS


def _class_bases() -> dict[type[nn.Module], str]:
    """{class: base} of what `ACT2CLS` builds under the family's names; an entry that another package put there is probed."""
    found: dict[type[nn.Module], str] = {nn.SiLU: "silu"}
    for key, base in STOCK_KEYS.items():
        entry = activations.ACT2CLS.get(key)
        cls = entry[0] if isinstance(entry, tuple) else entry
        if isinstance(cls, type) and cls.__module__.startswith(("torch.nn.", activations.__name__)):
            found[cls] = base
    return found


_CLASS_BASES = _class_bases()


def base_of(module: nn.Module) -> str | None:
    """The base whose λ = 1 this stock activation module is, or None if it is not of the family."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _CLASS_BASES.get(type(module))


def probed_base(module: nn.Module) -> str | None:
    """The base whose λ = 1 the module computes, by its class or, of a class that is not known, by what it makes of numbers.

    Only of a module without children, parameters, buffers and state, and not of torch's own others: see `computed_base`.
    """
    base = base_of(module)
    if base is not None or type(module).__module__.startswith("torch.nn.") or isinstance(module, LambdaGELU):
        return base
    return computed_base(module)


def transformers_parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """{module name: model} of the outermost transformers models in `model`, itself under the name "" if it is one."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return found


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


def quantised_weight(model: nn.Module) -> str | None:
    """The name of a weight that is quantised, or of a part of the model: its elements cannot be scaled or refit.

    Known by its elements (float8, integers) or its class (bitsandbytes, torchao, quanto), by the buffer that GPTQ and AWQ
    pack it into, by the package that its module is of (HQQ can view packed integers as floats), by the module that torch's
    own quantisation put in the place of a linear one, which has no parameter, by the scheme that compressed-tensors leaves
    on the module, whose weight may be floating point with rounded values, as BitNet's is, or by what loaded the model.
    """
    for name, module in model.named_modules():
        if getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None:
            return joined(name, "weight")
    for name, parameter in model.named_parameters():
        if _is_packed(parameter) or not parameter.is_floating_point() or parameter.element_size() == 1:
            return name
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED_MODULES):
            return joined(name, "weight")
        if "qweight" in dict(module.named_buffers(recurse=False)):
            return joined(name, "qweight")
        method = getattr(getattr(getattr(module, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
        if method is not None and method != "gguf":  # of which transformers unpacks what it has no packed form for
            return f"{name or type(module).__name__} as {getattr(method, 'value', method)} loads it"
    return None


_QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "optimum.quanto.", "hqq.")


def _is_packed(parameter: nn.Parameter) -> bool:
    """Whether it is of a class that holds its elements in other tensors, as DTensor does too, or of a quantising package."""
    packs = hasattr(parameter, "__tensor_flatten__") and not hasattr(parameter, "full_tensor")
    return packs or type(parameter).__module__.startswith(("torchao", "bitsandbytes"))


def joined(prefix: str, name: str) -> str:
    """`prefix.name`, or the one of them that is not empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation at all, as torch and transformers define them."""
    return (
        isinstance(module, LambdaGELU)
        or type(module) in _CLASS_BASES
        or (
            type(module).__module__ in ("torch.nn.modules.activation", activations.__name__)
            and not isinstance(module, nn.MultiheadAttention)
        )
    )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with a shared instance under each of its names (xlm and flaubert share one activation)."""
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=False)
    return modules
