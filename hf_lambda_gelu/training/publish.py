"""From a trainer to a ReLU network, in memory and on the Hub: the one way, of `push_to_hub` and of the scripts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..activation.module import hardness_sites
from ..checkpoints.card import CardDetails
from ..checkpoints.hub import push_relu_to_hub
from ..surgery.report import SubstitutionReport
from ..surgery.substitution import relu_ize
from .callback import as_it_is
from .proof_inputs import own_examples
from .pushes import repository_of, visibility
from .resuming import step_of
from .wider import narrower

if TYPE_CHECKING:
    from .trainer import LambdaGELUTrainer


# of a run's arguments, what a card states besides those of the hardness
_STATED = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
_TIMING = ("runtime", "_per_second", "preparation_time")
_END = "train_runtime"  # in the last log of a training


def push_relu(
    trainer: LambdaGELUTrainer,
    commit_message: str | None,
    details: CardDetails,
    *,
    token: str | None,
    revision: str | None,
    private: bool | None,
    inputs: dict[str, Tensor] | None,
    trust_remote_code: bool = False,
) -> CommitInfo | None:
    """`push_trained` by the first process, to the trainer's repository, after what is still being pushed."""
    args = trainer.args
    token = token if token is not None else args.hub_token
    with visibility(args, private):
        repository_of(trainer, token)
    if not trainer.is_world_process_zero():
        return None
    return push_trained(
        trainer,
        commit_message,
        details,
        private=private if private is not None else args.hub_private_repo,
        revision=revision or args.hub_revision,
        token=token,
        inputs=inputs,
        trust_remote_code=trust_remote_code,
    )


def push_trained(
    trainer: LambdaGELUTrainer,
    commit_message: str | None,
    details: CardDetails,
    *,
    report: SubstitutionReport | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    inputs: dict[str, Tensor] | None = None,
    trust_remote_code: bool = False,
) -> CommitInfo:
    """Publishes what a trainer has made as a ReLU network; the trainer's own model stays as it is.

    Args:
        details: what the card shall say; training arguments and `own_evaluation` are added where it says nothing.
        report: of a model that is ReLU already, what `relu_ize` returned; by default what it left on the model.
        private, revision, token, trust_remote_code: as for `push_relu_to_hub`.
        inputs: a batch for the proof; by default a few of the trainer's own examples, see `own_examples`.

    Raises:
        SoftGateError: gates are too soft for their targets: training has not finished, or brought back an early checkpoint.
        Everything that `push_relu_to_hub` raises.
    """
    model, learned = trainer.accelerator.unwrap_model(trainer.model), None
    if hardness_sites(model):
        learned = trainer.learned_hardness
        model = copy.deepcopy(model)
        report = substitute_trained(trainer, model)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    measured = own_evaluation(trainer)
    if measured and not details.results:
        details = dataclasses.replace(details, results={"ReLU": measured}, final="ReLU")
    assert trainer.hub_model_id is not None  # init_hf_repo has set it
    return push_relu_to_hub(
        model,
        trainer.hub_model_id,
        processor=() if trainer.processing_class is None else trainer.processing_class,
        details=dataclasses.replace(details, arguments={**stated_arguments(trainer.args), **details.arguments}),
        learned=learned,
        history=trainer.state.log_history,
        report=report,
        private=private,
        revision=revision,
        commit_message=commit_message,
        token=token,
        inputs=inputs or own_examples(trainer, model),
        trust_remote_code=trust_remote_code,
    )


def substitute_trained(trainer: LambdaGELUTrainer, model: nn.Module, force: bool = False) -> SubstitutionReport:
    """Puts ReLU in the place of the λ-GELUs that a trainer has hardened, in place, and reports it as of this run.

    The gates are held against the targets of the run. The change of the outputs and the zeros are measured on the first
    batches of its evaluation set, and the report has what the switch made
    wider, and its refit, if that was in this process.

    Args:
        model: the trainer's own, or a copy of it.
        force: as for `relu_ize`.

    Raises:
        SoftGateError: as `relu_ize`; the model is as it was.
    """
    args = trainer.args
    targets = trainer.hardness_targets if args.hardness_target == "calibrated" else None
    sample = evaluation_sample(trainer)
    report = relu_ize(model, force, tolerance=args.hardness_tolerance, targets=targets or None, calibration=sample)
    report.compensation = None if report.forced else trainer.compensation  # soft gates are of before the switch
    if trainer.hinges is not None and narrower(model, trainer.hinges) is None:  # not a checkpoint from before the switch
        report.hinges = trainer.hinges
    return report


def stated_arguments(args: TrainingArguments, hardness: bool = True) -> dict[str, Any]:
    """{name: value} of the arguments that a card states; with `hardness`, those of hardness learning are among them.

    Those of the sparsity penalty are, where there was one.
    """
    prefixes = ("hardness_", "sparsity_") if getattr(args, "sparsity_penalty", 0.0) else ("hardness_",)
    return {n: value for n, value in vars(args).items() if n in _STATED or (hardness and n.startswith(prefixes))}


def evaluation_sample(trainer: Trainer, batches: int = 4) -> list[dict[str, Any]] | None:
    """The first batches of the evaluation set, for what a substitution changes and the zeros that it makes.

    None without an evaluation set, and among several processes, whose loaders run in step.
    """
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict) or trainer.args.world_size > 1:
        return None
    made = getattr(trainer, "calibration_inputs", as_it_is)
    return [inputs for batch in itertools.islice(trainer.get_eval_dataloader(), batches) for inputs in made(batch)]


def own_evaluation(trainer: Trainer) -> dict[str, float]:
    """The metrics of the network that a trainer holds, as ReLU where that was measured too; empty if none are of it.

    What is evaluated while it trains are the weights of that step: those of the last step count, or those of the best
    checkpoint's where that was brought back at the end. What is evaluated after the end counts in any case.
    """
    history: list[dict[str, Any]] = trainer.state.log_history
    ends = [index for index, entry in enumerate(history) if _END in entry]
    after = {key: value for entry in history[ends[-1] :] for key, value in entry.items()} if ends else {}
    held = _held_step(trainer, bool(ends))
    then = {key: value for entry in history if entry.get("step") == held for key, value in entry.items()}
    found: dict[str, float] = next((each for each in map(_metrics, (after, then)) if each), {})
    # with several evaluation sets each has its name in between: eval_a_relu_loss, beside eval_a_loss
    plain = {key: key.replace("_relu_", "_", 1) for key in found}
    relu = {key: value for key, value in found.items() if plain[key] != key and plain[key] in found}
    return {plain[key].removeprefix("eval_"): value for key, value in (relu or found).items()}


def _held_step(trainer: Trainer, ended: bool) -> int:
    """The step whose weights the trainer holds."""
    best = trainer.state.best_model_checkpoint
    if ended and trainer.args.load_best_model_at_end and best is not None:
        return step_of(Path(best))
    step: int = trainer.state.global_step
    return step


def _metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Those of an evaluation; not the timing."""
    return {key: value for key, value in logs.items() if key.startswith("eval_") and not key.endswith(_TIMING)}
