"""Gates as ReLU for the time of a measurement, and the error that says they are too soft to stay so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..activation.module import hardness_sites
from ..structure.edits import lambda_keys


class SoftGateError(RuntimeError):
    """Gates are too soft for ReLU to take their place unnoticed. The model is as it was."""


@contextlib.contextmanager
def gates_as_relu(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` computes what it will after `relu_ize`: each x Φ(λx) is max(x, 0). Blocks may nest.

    Nothing is replaced and λ is kept; afterwards the gates are as they were, whatever the block raised. The config says
    `relu` within the block too, for code that makes a fresh activation from it in forward. [derived]

    Args:
        model: any module, on any device, in any dtype; without λ-GELU in it nothing happens.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> gate = hlg.LambdaGELU()
        >>> with torch.no_grad(), hlg.gates_as_relu(gate):
        ...     gate(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    sites = hardness_sites(model).values()
    keys = lambda_keys(model)
    before: list[tuple[dict[str, Any], str, object]] = [(vars(site), "as_relu", site.as_relu) for site in sites]
    before += [(vars(config), name, key) for config, name, key in keys]
    try:
        try:
            for site in sites:
                site.as_relu = True
            for config, name, _ in keys:
                setattr(config, name, "relu")
            yield
        finally:
            for attributes, name, value in before:  # no call is made here: at each a stop could come
                attributes[name] = value
    finally:
        for attributes, name, value in before:  # where a stop came upon the lines above
            attributes[name] = value
