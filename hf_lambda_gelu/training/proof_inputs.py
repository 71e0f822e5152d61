"""Inputs for the proof of what a trainer has made: a few of its own examples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from .._compat import collator_of
from ..measurement.batches import accepted_names
from ..measurement.examples.choice import why_not
from ..measurement.examples.maker import fitting
from ..measurement.forward import random_state_kept

if TYPE_CHECKING:
    from .trainer import LambdaGELUTrainer

_EXAMPLES = 4


def own_examples(trainer: LambdaGELUTrainer, model: Any) -> dict[str, Tensor] | None:
    """A batch of the evaluation set's first examples, else of the training set's, by the trainer's collator.

    It goes through `calibration_inputs`, is cut to the tensors that forward takes, and has labels only where forward makes
    its decoder's input of them. None where the trainer has no examples, or none that forward takes.

    Args:
        model: what was made of the trainer's model.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        evaluation = next(iter(evaluation.values()), None)
    with random_state_kept(model):  # of what augments and masks
        for dataset in (evaluation, trainer.train_dataset):
            for batch in _batches(trainer, dataset):
                names = accepted_names(model)
                inputs = {n: v for n, v in batch.items() if isinstance(v, Tensor) and (names is None or n in names)}
                inputs = {name: fitting(model, value) for name, value in inputs.items()}
                unlabelled = {name: value for name, value in inputs.items() if name not in trainer.label_names}
                for found in (unlabelled, inputs):
                    if found and why_not(model, found) is None:
                        return found
    return None


def _batches(trainer: LambdaGELUTrainer, dataset: Any) -> list[Mapping[str, Any]]:
    """What the trainer makes of a dataset's first examples; nothing where it cannot."""
    if dataset is None:
        return []
    try:
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            rows = [dataset[index] for index in range(min(_EXAMPLES, len(dataset)))]
        else:
            rows = list(itertools.islice(dataset, _EXAMPLES))
        made = trainer.calibration_inputs(collator_of(trainer)(rows)) if rows else []
        return [batch for batch in made if isinstance(batch, Mapping)]
    except Exception:  # of whatever data set and collator: there are other ways to inputs
        return []
