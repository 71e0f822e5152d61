"""λ-GELUs that no config attribute governs, because their class hard-codes its activation; or should, and does not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..activation.module import hardness_sites
from .config import LAMBDA_KEYS, STOCK_KEYS
from .config_probe import Governed, governed_modules
from .modules import joined, transformers_parts


def hard_coded_sites(model: nn.Module) -> list[str]:
    """The λ-GELUs inside transformers models that no config attribute governs: a stock reload brings their GELU back.

    Raises:
        ValueError: a config says of a λ-GELU that it is smooth.
    """
    names: list[str] = []
    for prefix, part in transformers_parts(model).items():
        sites = hardness_sites(part)
        attributes = governed_modules(part) if sites else []
        governed: set[str] = set()
        for attribute in (a for a in attributes if a.value in LAMBDA_KEYS):
            if attribute.failure and not attribute.kept:  # `convert` could probe it, or would not have set the key
                raise RuntimeError(
                    f"config.{joined(prefix, attribute.path)} = {attribute.value!r}: which modules it governs cannot be "
                    f"found out, as {type(part).__name__} cannot be built again: {attribute.failure}"
                )
            governed.update(attribute.modules)
        _check_told(part, prefix, attributes)
        names += [joined(prefix, name) for name in sites if name not in governed]
    return names


def _check_told(part: PreTrainedModel, prefix: str, attributes: Sequence[Governed]) -> None:
    """ValueError where a smooth activation of the config governs λ-GELUs: a part of the model was converted by itself."""
    sites = hardness_sites(part)
    for attribute in attributes:
        found = next((name for name in attribute.modules if name in sites), None)
        if attribute.value in STOCK_KEYS and found is not None:
            key = next(key for key, base in LAMBDA_KEYS.items() if base == sites[found].base)
            raise ValueError(
                f"config.{joined(prefix, attribute.path)} = {attribute.value!r} governs {joined(prefix, found)}, which is "
                f"λ-GELU: a part of {type(part).__name__} was converted by itself, and a checkpoint of the whole would lose "
                f"λ. Set {attribute.path} of its config to {key!r}; or load it again, and convert the whole with only="
            )
