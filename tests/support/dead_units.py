"""Units that never fire, and outputs with and without them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lambda_gelu.measurement.difference import float_outputs
from support import tiny


def rows(module: nn.Module) -> Tensor:
    """The weight as (units, inputs), whichever way it lies."""
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def kill(model: nn.Module, before: str, units: list[int]) -> None:
    """Let these units never fire: by their bias, or where there is none by weights of 0."""
    module = model.get_submodule(before)
    with torch.no_grad():
        rows(module)[units] = 0.0
        if module.bias is not None:
            module.bias[units] = -1.0


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return float_outputs(model(**batch))


def close(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-6) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def batches(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    return [tiny.inputs(model, seed) for seed in range(count)]
