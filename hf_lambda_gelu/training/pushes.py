"""What a Trainer uploads as it is, while it trains or without a proof: smooth networks, and whatever else it holds."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .._compat import finish_current_push, push_jobs
from ..checkpoints.repository import withdraw_card
from ..surgery.adapter_hardness import FILE

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def visibility(args: TrainingArguments, private: bool | None) -> Iterator[None]:
    """Within the block, transformers makes a repository private or public as is asked for; None leaves it to `args`.

    The parameter `private` of its own methods is newer than what runs on Python 3.10.
    """
    before = args.hub_private_repo
    args.hub_private_repo = before if private is None else private
    try:
        yield
    finally:
        args.hub_private_repo = before


def repository_of(trainer: Trainer, token: str | None) -> None:
    """Makes the trainer's repository if need be, and lets nothing be on its way there."""
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token)
    if trainer.is_world_process_zero():
        finish_current_push(trainer)


def before_other_weights(trainer: Trainer, token: str | None, revision: str | None) -> None:
    """Readies the trainer's repository for weights that no proof has seen: no card of a ReLU network shall describe them."""
    token = token if token is not None else trainer.args.hub_token
    repository_of(trainer, token)
    if trainer.is_world_process_zero():
        assert trainer.hub_model_id is not None
        withdraw_card(HfApi(), trainer.hub_model_id, revision or trainer.args.hub_revision, token)


def push_checkpoint(trainer: Trainer, folder: str, push: Callable[[str], None]) -> None:
    """Trainer's `push` of a checkpoint while it trains, with λ beside adapters and no card of a former ReLU network.

    Training goes on where it fails, which is said: Trainer itself says nothing.
    """
    args, under_way = trainer.args, push_jobs(trainer)
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if not args.hub_always_push and not all(job.done() for job in under_way):
        return  # as Trainer's does
    try:
        assert trainer.hub_model_id is not None
        withdraw_card(HfApi(), trainer.hub_model_id, args.hub_revision, args.hub_token)
    except Exception as error:  # whatever the reason is, the checkpoint is on the disk
        _tell_of_failure(trainer, Path(folder), error)
        return
    beside = Path(folder, FILE)
    if beside.is_file():
        shutil.copy(beside, str(args.output_dir))
    push(folder)

    def done(job: Future[Any]) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            _tell_of_failure(trainer, Path(folder), error)

    for job in push_jobs(trainer):
        if job not in under_way:
            job.add_done_callback(done)


def _tell_of_failure(trainer: Trainer, folder: Path, error: BaseException) -> None:
    told = " ".join(str(error).split())
    logger.warning(f"{folder.name} was not pushed to {trainer.hub_model_id}, and training goes on: {told}")
