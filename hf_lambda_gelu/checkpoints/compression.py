"""What was done to a network's weights after it became ReLU, as its config and the weights themselves show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from ..structure.quantised import is_packed

# of a linear map's elements: 4-bit integers alone make up to a fifth of them 0
_PRUNED_FROM = 0.3


def quantisation(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` in a folder's config.json; None where its weights are as they are."""
    found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("quantization_config")
    return found if isinstance(found, dict) else None


def compression(folder: Path, pruned: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the card says of it, as JSON can hold it; None for a network that is neither quantised nor pruned.

    Args:
        folder: where the model was saved.
        pruned: `pruned_maps` of the model before that: packed weights show no zeros.
    """
    quantised = quantisation(folder)
    if quantised is None and pruned is None:
        return None
    return {"quantised": None if quantised is None else _quantised(quantised), "pruned": pruned}


def _quantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its method, and in words how weights and inputs are rounded."""
    groups = config.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        schemes = [_scheme(group) for group in groups.values()]
    else:
        bits = config.get("bits") or (4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None)
        schemes = [f"weights in {bits} bits"] if bits else []
    return {
        "method": str(config.get("quant_method", "unknown")),
        "version": str(config.get("version", "")),
        "schemes": schemes,
        "left": [str(name) for name in config.get("ignore") or config.get("modules_to_not_convert") or []],
    }


def _scheme(group: Mapping[str, Any]) -> str:
    """Of one group of compressed-tensors: weights of Linear: 4-bit int, a scale for each group of 128; inputs: …"""
    weights, inputs = group.get("weights"), group.get("input_activations")
    parts = [f"weights of {', '.join(map(str, group.get('targets', [])))}: {_rounding(weights)}"] if weights else []
    if inputs:
        parts.append(f"their inputs: {_rounding(inputs)}{', found as it runs' if inputs.get('dynamic') else ''}")
    return "; ".join(parts)


def _rounding(how: Mapping[str, Any]) -> str:
    strategy = str(how.get("strategy"))
    each = f"group of {how.get('group_size')}" if strategy == "group" else strategy
    zero = "" if how.get("symmetric", True) else " and a zero point"
    return (
        f"{how.get('num_bits')}-bit {how.get('type')}, a scale{zero} for {'the' if strategy == 'tensor' else 'each'} {each}"
    )


def pruned_maps(model: nn.Module) -> dict[str, Any] | None:
    """How many linear maps have at least 30 % exact zeros, the share of zeros in these, and whether all are 2:4."""
    found = {
        name: weight
        for name, module in model.named_modules()
        if (weight := _weight(module)) is not None and _PRUNED_FROM <= float((weight == 0).double().mean()) < 1.0
    }
    if not found:
        return None
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    two_of_four = all(_two_of_four(weight) for weight in found.values())
    return {"maps": len(found), "zeros": zeros / sum(w.numel() for w in found.values()), "two_of_four": two_of_four}


def _weight(module: nn.Module) -> Tensor | None:
    """(outputs, inputs) of a linear map whose weight has floating point values."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, Conv1D)) or not isinstance(weight, Tensor):
        return None
    if (
        weight.dim() != 2
        or not weight.is_floating_point()
        or weight.is_meta
        or weight.element_size() == 1
        or is_packed(weight)
    ):
        return None
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _two_of_four(weight: Tensor) -> bool:
    """Whether two of each four neighbours in a row are 0, which some devices skip."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(len(weight), -1, 4) == 0).sum(-1) >= 2).all())
