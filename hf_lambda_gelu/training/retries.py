"""`auto_find_batch_size`: a run that is out of memory begins anew with smaller batches, and goes on from the weights it has.

So it must not do that past the switch, where λ is at its target and maps are refit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

from accelerate.utils.memory import should_reduce_batch_size  # it ships no types
from transformers import TrainerState, TrainingArguments


def batch_size_now(args: TrainingArguments, state: TrainerState) -> int:
    """Examples that a device takes at once: what was asked for, or the fewer that memory was found to be enough for."""
    found: int = args.per_device_train_batch_size
    if args.auto_find_batch_size and state.train_batch_size is not None:
        found = max(1, state.train_batch_size // max(1, args.n_gpu))
    return found


def wants_smaller_batches(args: TrainingArguments, error: BaseException | None) -> bool:
    """Whether the run is to begin anew for want of memory."""
    return args.auto_find_batch_size and isinstance(error, Exception) and bool(should_reduce_batch_size(error))


@contextlib.contextmanager
def not_begun_anew(args: TrainingArguments) -> Iterator[None]:
    """RuntimeError where memory is out within the block, the switch, so that the run ends instead of beginning anew."""
    try:
        yield
    except Exception as error:
        if not any(wants_smaller_batches(args, one) for one in (error, error.__cause__)):
            raise
        raise RuntimeError(
            "the switch needs more memory than there is, to measure or refit the model on batches of the size that training "
            "has: auto_find_batch_size would begin the run anew for that, until no batch is left. Set a smaller "
            "per_device_train_batch_size with more gradient_accumulation_steps, or hardness_compensate='none'"
        ) from error


def check_not_begun_anew(
    profile: Mapping[str, float], last_set: Mapping[str, float], args: TrainingArguments, state: TrainerState
) -> None:
    """Raises ValueError where `auto_find_batch_size` has begun a run anew past its switch, so that it learns no λ.

    Args:
        profile: λ of the model with which the run begins.
        last_set: λ as it was set before memory was out.
    """
    same = all(math.isclose(value, last_set.get(name, 0.0), rel_tol=1e-2) for name, value in profile.items())
    if args.auto_find_batch_size and same:
        raise ValueError(
            f"auto_find_batch_size begins the run anew with batches of {batch_size_now(args, state)}, past its switch: λ is "
            "at its target or on its way there, and would be so from the first step. Begin with the model as it was, "
            f"converted, and per_device_train_batch_size={batch_size_now(args, state)}"
        )
