"""The linear maps that the package finds in a model on one batch."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from hf_lambda_gelu.structure.tracing import Trace, trace
from support import tiny


def found(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> Trace:
    """What `trace` says of the model, on its tiny inputs if no batch is given."""
    batch = tiny.inputs(model) if batch is None else batch
    return trace(model, lambda: model(**batch))
