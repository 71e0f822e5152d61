"""`example_inputs`: a small batch that a model's forward takes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...structure.transaction import transaction
from ..batches import FORWARD_ERRORS
from ..forward import measuring, random_state_kept
from .architectures import SPECIAL, inputs_by_architecture
from .main_input import inputs_by_main_input
from .maker import fitting


@transaction
def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small batch for the model's forward, the same one each time, on the model's device and in its dtype.

    It is made by the name of the main input; where forward does not take that, by forward's signature and the architecture.
    Forward is run once on each that is tried, in eval mode without gradients. The model and the random state are afterwards
    as they were.

    Raises:
        ValueError: forward takes neither: pass inputs of your own.
    """
    main: str | list[str] = model.main_input_name  # OneFormer has a list of them
    takes = inspect.signature(model.forward).parameters
    if model.config.model_type not in SPECIAL and not set([main] if isinstance(main, str) else main) <= set(takes):
        raise ValueError(_refusal(model, f"its forward does not take {main!r}, its main input"))
    failures = []
    with random_state_kept(model), measuring(model), torch.no_grad():
        for make in (inputs_by_main_input, inputs_by_architecture):
            try:
                batch = {name: fitting(model, value) for name, value in make(model).items()}
                model(**{name: value.clone() for name, value in batch.items()})  # copies: a model may write into its input
            except FORWARD_ERRORS as error:
                failures.append(f"{type(error).__name__}: {error}")
            else:
                return batch
    raise ValueError(_refusal(model, "; then ".join(failures)))


def _refusal(model: PreTrainedModel, why: str) -> str:
    return f"no inputs can be guessed for {type(model).__name__}: {why}. Pass inputs=…, what its forward takes"
