"""`example_inputs`: a small batch that a model's forward takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...structure.transaction import transaction
from ..batches import FORWARD_ERRORS
from ..forward import measuring, random_state_kept
from .architectures import inputs_by_architecture
from .by_processor import inputs_by_processor
from .main_input import inputs_by_main_input
from .maker import fitting


@transaction
def example_inputs(model: PreTrainedModel, processor: Any = None) -> dict[str, Tensor]:
    """A small batch for the model's forward, the same one each time, on the model's device and in its dtype.

    It is made by the processor, if there is one; by the name of the main input; by forward's signature and the
    architecture: the first that forward takes. Forward is run once on each that is tried, in eval mode without gradients.
    The model and the random state are afterwards as they were.

    Args:
        processor: the model's tokenizer, image processor or feature extractor; a list for several.

    Raises:
        ValueError: forward takes none: pass inputs of your own.
    """
    ways: list[Callable[[PreTrainedModel], Mapping[str, Tensor]]] = [inputs_by_main_input, inputs_by_architecture]
    if processor is not None:
        ways.insert(0, partial(inputs_by_processor, processor=processor))
    failures = []
    with random_state_kept(model):
        for make in ways:
            try:
                with measuring(model), torch.no_grad(), torch.device("cpu"):  # whatever torch's default device is
                    batch = {name: fitting(model, value) for name, value in make(model).items()}
            except Exception as error:  # of whatever processor
                failures.append(f"{type(error).__name__}: {error}")
                continue
            failure = why_not(model, batch)
            if failure is None:
                return batch
            failures.append(failure)
    raise ValueError(
        f"no inputs can be guessed for {type(model).__name__}: {'; then '.join(failures)}. Pass inputs=…, what its forward "
        "takes"
    )


def why_not(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> str | None:
    """What the model's forward raises on a batch, in eval mode without gradients; None if nothing."""
    with random_state_kept(model), measuring(model), torch.no_grad():
        try:
            model(**{name: value.clone() for name, value in batch.items()})  # copies: a model may write into its input
        except FORWARD_ERRORS as error:
            return f"{type(error).__name__}: {error}"
    return None
