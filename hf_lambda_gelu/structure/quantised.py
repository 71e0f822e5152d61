"""Weights whose elements stand for other numbers: they can be neither scaled nor refit."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from .modules import joined

_QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "optimum.quanto.", "hqq.")
_FAKE = "torchao.quantization.qat"  # rounds a weight at each forward, and keeps it whole


def quantised_weight(model: nn.Module) -> str | None:
    """The name of a weight that is quantised, or of a part of the model: its elements cannot be scaled or refit.

    Known by its elements (float8, integers) or its class (bitsandbytes, torchao, quanto), by the buffer that GPTQ and AWQ
    pack it into, by the package that its module is of (HQQ can view packed integers as floats), by the module that torch's
    own quantisation put in the place of a linear one, which has no parameter, or torchao's in training, by the scheme that
    compressed-tensors leaves on the module, whose weight may be floating point with rounded values, as BitNet's is, or by
    what loaded the model.
    """
    for name, module in model.named_modules():
        if _has_scheme(module):
            return joined(name, "weight")
    for name, parameter in model.named_parameters():
        if is_packed(parameter) or not parameter.is_floating_point() or parameter.element_size() == 1:
            return name
    for name, module in model.named_modules():
        if type(module).__module__.startswith((*_QUANTISED_MODULES, _FAKE)):
            return joined(name, "weight")
        if "qweight" in dict(module.named_buffers(recurse=False)):
            return joined(name, "qweight")
        method = getattr(getattr(getattr(module, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
        if method is not None and method != "gguf":  # of which transformers unpacks what it has no packed form for
            return f"{name or type(module).__name__} as {getattr(method, 'value', method)} loads it"
    return None


def quantised_unsaid(model: PreTrainedModel) -> str | None:
    """The name of a quantised weight of which a saved config would say nothing, as it was quantised in memory.

    compressed-tensors, by which llm-compressor marks modules, writes its own into the config when the model is saved.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        return None
    return None if any(map(_has_scheme, model.modules())) else quantised_weight(model)


def changed_by_saving(model: nn.Module) -> str | None:
    """The name of a 4-bit weight of bitsandbytes on a CPU: its first forward there packs it anew, and `save_pretrained` then
    writes other scales, and leaves these in memory too (bitsandbytes 0.50.2: outputs 0.5 off)."""
    on_cpu = ((name, p) for name, p in model.named_parameters() if p.device.type == "cpu")
    return next(
        (name for name, p in on_cpu if type(p).__module__.startswith("bitsandbytes") and hasattr(p, "quant_state")), None
    )


def _has_scheme(module: nn.Module) -> bool:
    return getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None


def is_packed(parameter: Tensor) -> bool:
    """Whether it is of a class that holds its elements in other tensors, as DTensor does too, or of a quantising package."""
    packs = hasattr(parameter, "__tensor_flatten__") and not hasattr(parameter, "full_tensor")
    return packs or type(parameter).__module__.startswith(("torchao", "bitsandbytes"))
