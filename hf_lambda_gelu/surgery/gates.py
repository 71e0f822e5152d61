"""Gates as ReLU for the time of a measurement, and the error that says they are too soft to stay so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig

from ..activation.module import hardness_sites
from ..structure.config import LAMBDA_KEYS, activation_attributes, put_attribute


class SoftGateError(RuntimeError):
    """Gates are too soft for ReLU to take their place unnoticed. The model is as it was."""


@contextlib.contextmanager
def gates_as_relu(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` computes what it will after `relu_ize`; nothing is replaced and λ is kept. Blocks may nest.

    The config says `relu` within the block too, for code that makes a fresh activation from it in forward.
    """
    sites = {site: site.as_relu for site in hardness_sites(model).values()}
    configs = {id(c): c for module in model.modules() if isinstance(c := getattr(module, "config", None), PreTrainedConfig)}
    lookups = [(c, path, key) for c in configs.values() for path, key in activation_attributes(c) if key in LAMBDA_KEYS]
    for site in sites:
        site.as_relu = True
    for config, path, _ in lookups:
        put_attribute(config, path, "relu")
    try:
        yield
    finally:
        for site, before in sites.items():
            site.as_relu = before
        for config, path, key in lookups:
            put_attribute(config, path, key)
