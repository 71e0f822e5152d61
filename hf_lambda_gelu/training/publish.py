"""From a trained model to a published ReLU network: what `LambdaGELUTrainer.push_to_hub` does."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import Trainer

from ..activation.module import hardness_sites
from ..checkpoints.card import CardDetails
from ..checkpoints.hub import push_relu_to_hub
from ..surgery.substitution import relu_ize

if TYPE_CHECKING:
    from .trainer import LambdaGELUTrainer


def push_trained(trainer: LambdaGELUTrainer, commit_message: str, details: CardDetails, **target: Any) -> CommitInfo:
    """Publish what a trainer has made as a ReLU network; the trainer's own model stays as it is.

    Args:
        details: what the card shall say; training arguments and the last evaluation are added where it says nothing.
        target: `revision`, `private`, `token` of `push_relu_to_hub`.

    Raises:
        SoftGateError: gates are too soft for their targets: training has not finished, or brought back an early checkpoint.
        Everything that `push_relu_to_hub` raises.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    learned = trainer.learned_hardness if hardness_sites(model) else None
    if learned:
        model = copy.deepcopy(model)
        report = relu_ize(
            model,
            tolerance=args.hardness_tolerance,
            targets=trainer.hardness_targets or None,
            calibration=evaluation_sample(trainer),
        )
        report.compensation = trainer.compensation  # of the switch, for the card
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
            model._relu_report = report
    arguments = {
        name: value
        for name, value in vars(args).items()
        if name.startswith("hardness_")
        or name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
    }
    results, final = details.results, details.final
    measured = _last_evaluation(trainer.state.log_history)
    if not results and measured:
        final = "ReLU"
        results = {final: measured}
    return push_relu_to_hub(
        model,
        trainer.hub_model_id,
        processor=() if trainer.processing_class is None else trainer.processing_class,
        details=dataclasses.replace(details, results=results, final=final, arguments={**arguments, **details.arguments}),
        learned=learned,
        history=trainer.state.log_history,
        commit_message=commit_message,
        **target,
    )


def evaluation_sample(trainer: Trainer, batches: int = 4) -> list[dict[str, Any]] | None:
    """The first batches of the evaluation set, for what a substitution changes and the zeros that it makes.

    None without an evaluation set, and among several processes, whose loaders run in step.
    """
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict) or trainer.args.world_size > 1:
        return None
    return list(itertools.islice(trainer.get_eval_dataloader(), batches))


def _last_evaluation(history: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the last evaluation, of the ReLU network where both were measured; not the timing."""
    last = next((entry for entry in reversed(history) if any(key.startswith("eval_") for key in entry)), {})
    prefix = "eval_relu_" if any(key.startswith("eval_relu_") for key in last) else "eval_"
    timing = ("runtime", "_per_second", "preparation_time")
    return {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix) and not k.endswith(timing)}
