"""Inputs of tiny models: those that the package makes where a user passes none."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel


def example_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Inputs that forward takes, by its signature and the architecture, the same ones each time."""
    # only here: importing the package registers λ-GELU, and a process that reloads as stock transformers must not have it
    from hf_lambda_gelu.measurement.examples.architectures import inputs_by_architecture

    return inputs_by_architecture(model, batch_size)
