"""λ beside adapters: PEFT saves these alone, so λ goes into a file of its own in the same folder. [derived]"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..activation.module import hardness_sites
from ..structure.adapters import has_adapters
from ..structure.transaction import keep, transaction

FILE = "lambda_gelu_hardness.safetensors"

logger = logging.get_logger(__name__)


def save_hardness_with_adapters(model: nn.Module) -> None:
    """Lets `save_pretrained` of a model with adapters, and what calls it, write λ too; twice is once."""
    if has_adapters(model) and "save_pretrained" not in vars(model) and hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = types.MethodType(_save_pretrained, model)  # a copy's is bound to the copy


def _save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    cls: Any = type(model)
    if kwargs.get("is_main_process", True):
        Path(save_directory, FILE).unlink(missing_ok=True)  # a stop leaves no λ there, rather than that of other adapters
    saved = cls.save_pretrained(model, save_directory, *args, **kwargs)
    sites = hardness_sites(model)
    if not sites:
        logger.warning_once(
            "the adapters' files do not hold what has become of their base, which has no λ-GELU any more: on the base as it "
            "is loaded they are part of another network. Save the whole: merge_and_unload(), then save_relu_pretrained; of "
            "prompts, which cannot be merged, the base too"
        )
    elif kwargs.get("is_main_process", True):
        save_file(
            {name: site.hardness.detach().cpu().contiguous() for name, site in sites.items()},
            Path(save_directory, FILE),
            metadata={"format": "pt"},
        )
        logger.warning_once(
            f"the adapters' files do not hold λ: it is in {FILE} beside them. To load both: PeftModel.from_pretrained(base, "
            "folder), then hf_lambda_gelu.convert(model) and hf_lambda_gelu.load_hardness(model, folder)"
        )
    return saved


@transaction
@torch.no_grad()
def load_hardness(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Gives each λ-GELU the λ that `save_pretrained` of a converted model with adapters has left beside them. [derived]

    Args:
        model: with adapters and λ-GELU at the same places, by `convert`.
        folder: of the adapters; or their name on the Hub.

    Raises:
        OSError: there is no λ in the folder.
        ValueError: the λ there belong to other places than the model's. The model is as it was.

    Examples:
        >>> from peft import PeftModel  # doctest: +SKIP
        >>> model = PeftModel.from_pretrained(base, "runs/adapters")  # doctest: +SKIP
        >>> report = hlg.convert(model)  # doctest: +SKIP
        >>> hlg.load_hardness(model, "runs/adapters")  # doctest: +SKIP
    """
    found = load_file(str(cached_file(folder, FILE)))
    sites = hardness_sites(model)
    if set(found) != set(sites):
        raise ValueError(
            f"{FILE} in {str(folder)!r} holds λ of {sorted(found)[:3]} …, {len(found)} in all; the model has λ-GELU at "
            f"{sorted(sites)[:3]} …, {len(sites)} in all: convert the model, wrapped by PEFT, as the one that was saved"
        )
    for name, site in sites.items():
        keep(site.unclipped_hardness)
        site.set_hardness(found[name].item())
    save_hardness_with_adapters(model)
