"""Whether what `save_pretrained` has written is the model: stock transformers builds the class anew, by the config alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..structure.computed_weights import computed_tensors
from ..structure.config import activation_attributes
from ..structure.loading import checkpoint_errors, quietly
from ..structure.quantised import quantised_weight
from .shards import read_shards


def check_as_saved(model: PreTrainedModel, folder: Path) -> None:
    """ValueError where the folder's config names other activations than the model's, or the class that stock transformers
    makes by it does not take all tensors in the folder and no others. Nothing is read but names and shapes."""
    config = type(model.config).from_pretrained(folder)
    smooth = set(activation_attributes(config)) - set(activation_attributes(model.config))
    if smooth:  # llm-compressor writes the config of the folder that a model was loaded from
        path, value = min(smooth)
        raise ValueError(
            f"the model's own save_pretrained wrote config.{path} = {value!r}, which is not what the model is: "
            "llm-compressor writes the config of the folder that a model was loaded from. Save the ReLU model first, load "
            "that folder, and compress what was loaded"
        )
    if getattr(config, "quantization_config", None) is None:
        _check_tensors(model, folder, config)
    elif getattr(model, "hf_quantizer", None) is None and quantised_weight(model) is None:
        raise ValueError(
            f"config.quantization_config says how weights are quantised, and those of {type(model).__name__} are not, so "
            "that stock transformers would not load them: del model.config.quantization_config"
        )


def _check_tensors(model: PreTrainedModel, folder: Path, config: Any) -> None:
    name, cls = type(model).__name__, type(model)
    tensors = {key: tensor for shard in read_shards(folder, name) for key, tensor in shard.tensors.items()}
    with checkpoint_errors(f"stock transformers would not load what {name}.save_pretrained wrote. {_why(model)}"), quietly():
        loaded: Any = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing, unexpected = sorted(loaded[1]["missing_keys"]), sorted(loaded[1]["unexpected_keys"])
    found = [f"{n} drawn at random, as the checkpoint would lack it" for n in missing[:1]]
    found += [f"{n}, which the class lacks, left out" for n in unexpected[:1]]
    found += [f"{key[0]} of another shape" for key in sorted(loaded[1]["mismatched_keys"], key=str)[:1]]
    if found:
        raise ValueError(
            f"stock transformers makes another {name} of its config: it would have {', and '.join(found)}. "
            f"{_why(model, missing)} "
            "model.save_pretrained writes it all the same, for code that builds such a model before it loads the weights"
        )


def _why(model: nn.Module, missing: Collection[str] = ()) -> str:
    """What has probably been done to the model, and what undoes it."""
    computed = next((str(found) for found in computed_tensors(model) if found.name in missing), None)
    return (
        f"{computed}."
        if computed
        else "Was a part of it replaced or wrapped after it was built (another head, for one)? Undo that first."
    )
