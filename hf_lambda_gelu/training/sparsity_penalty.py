"""A penalty on what the gates let through while training, so that the ReLU network puts out more exact zeros. [derived]

It is on r = max(z, 0) of what enters an activation, which is what ReLU will put out, whatever λ is now: λ gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .._compat import is_compiled
from ..activation.module import hardness_sites
from ..measurement.batches import batch_size
from ..measurement.places import Places
from ..measurement.site_rows import SiteRows
from ..structure.hooks import Hooks
from .arguments import LambdaGELUTrainingArguments
from .sparsity_norms import NORMS

_Call = tuple[Tensor, Tensor | None]  # rows that are tokens, and the example that each belongs to


class SparsityPenalty:
    """weight · a norm, the mean over the sites, the examples of an update and the tokens of each example.

    P = weight / (S B) · Σ_sites Σ_examples (1/T) Σ_tokens norm(z), with S sites, the B examples of all batches that an
    update accumulates, and T the tokens of an example that are no padding. So the batches of an update add up to what one
    batch of them all has.
    """

    def __init__(self, model: nn.Module, args: LambdaGELUTrainingArguments) -> None:
        self.model = model
        self.wanted = self.added = False  # whether a training step runs now, and whether it got its penalty
        self._weight, self._norm = args.sparsity_penalty, NORMS[args.sparsity_norm]
        # after the pass: within it, gradient checkpointing would run the norm again
        self._rows = SiteRows(model, hardness_sites(model), self._take, later=True)
        self._taken: dict[str, list[_Call]] = {}
        self._size = 0  # examples in the batch
        self._examples: int | None = None  # in all batches of the update; None where that is not known
        self._reached = False  # whether it ever had a gradient
        self._sums: tuple[float, Any, Any] = (0.0, 0.0, 0.0)  # of updates, penalties and zeros, since they were logged

    def begin_update(self, batches: Sequence[Any]) -> None:
        """The next update accumulates these batches."""
        sizes = [batch_size(self.model, batch) if isinstance(batch, Mapping) else 0 for batch in batches]
        self._examples = sum(sizes) if all(sizes) else None

    def step(self, step: Callable[[], Tensor]) -> Tensor:
        """What `step`, a training step, returns. ValueError if the penalty was not added in it."""
        self.wanted, self.added = True, False
        try:
            loss = step()
        finally:
            self.wanted, self._taken = False, {}
        if not self.added:
            self.model.zero_grad()
            raise ValueError(
                "sparsity_penalty is added by LambdaGELUTrainer.compute_loss, and this trainer's own does not call it: call "
                "super().compute_loss there, or set sparsity_penalty=0"
            )
        return loss

    @contextmanager
    def watching(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, the model runs once, on the inputs; `add` then has its penalty."""
        self._taken, self._size = {}, batch_size(self.model, inputs)
        with Hooks() as hooks, self._rows.counting(inputs):
            for site in self._rows.sites.values():
                hooks.before(site, self._check_gradients)
            yield

    def _check_gradients(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() or not any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            return
        raise ValueError(
            "sparsity_penalty does not go with reentrant gradient checkpointing, which runs the model without gradients "
            "first: set use_reentrant=False where it is set, in gradient_checkpointing_kwargs, or sparsity_penalty=0"
        )

    def add(self, loss: Tensor, batches: int, scaled: bool) -> Tensor:
        """The loss of the block's run: its value, with the gradient of loss + penalty.

        Args:
            batches: how many the update accumulates.
            scaled: whether what is returned is not divided by their number afterwards.

        Raises:
            ValueError: the penalty has no gradient.
        """
        share = 1 / batches if self._examples is None else self._size / self._examples
        self.added = True
        if not self._taken:  # a batch that reaches no site
            return loss
        norm, zeros = self._measured(loss.device)
        penalty = self._weight * share * norm
        self._reached = self._reached or penalty.requires_grad
        if not self._reached:
            raise ValueError(
                "sparsity_penalty reaches nothing that is trained: no parameter before an activation that ran requires a "
                "gradient. Train these, or set sparsity_penalty=0"
            )
        updates, penalties, shares = self._sums
        self._sums = updates + share, penalties + penalty.detach(), shares + share * zeros
        added = penalty if scaled else batches * penalty
        return loss + (added - added.detach())

    def logs(self) -> dict[str, float]:
        """The penalty, and the share of zeros that ReLU would put out, each a mean since the last call; in this process."""
        updates, penalties, zeros = self._sums
        self._sums = (0.0, 0.0, 0.0)
        return {"sparsity/penalty": float(penalties) / updates, "sparsity/zeros": float(zeros) / updates} if updates else {}

    def _take(self, name: str, rows: Tensor, seen: Places) -> None:
        if seen.example is None or seen.token is None:
            example = seen.example
        else:
            example = seen.example[seen.token.to(seen.example.device)]
        self._taken.setdefault(name, []).append((rows, example))

    def _measured(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean norm, over all sites, and the share of zeros, over those that ran."""
        norms, zeros, reached = [], [], 0.0
        for calls in self._taken.values():
            for (rows, _), weights in zip(calls, _weights(calls, self._size), strict=True):
                reached += float(weights.sum())
                norm = self._norm(rows)
                weights = weights.to(norm)
                norms.append((norm * weights).sum().to(device))
                zeros.append(((rows.detach() <= 0).to(norm).mean(-1) * weights).sum().to(device))
        self._taken = {}
        count = len(self._rows.sites) * self._size
        return torch.stack(norms).sum() / count, torch.stack(zeros).sum() / max(reached, 1.0)


def _weights(calls: Sequence[_Call], size: int) -> list[Tensor]:
    """What each row of a site's calls counts: those of an example 1 together; all alike where examples are not told."""
    examples = [example for _, example in calls if example is not None]
    if len(examples) < len(calls):
        total = sum(len(rows) for rows, _ in calls)
        return [torch.full((len(rows),), size / max(total, 1), device="cpu") for rows, _ in calls]
    tokens = torch.cat(examples).bincount(minlength=size).double()
    return [1.0 / tokens[example] for example in examples]


def loss_is_scaled(trainer: Trainer, items: Tensor | int | None) -> bool:
    """Whether Trainer takes a loss for one that is divided by what an update accumulates, as in its `training_step`."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)  # of newer transformers
    if told is not None:
        return bool(told)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def check_penalisable(args: LambdaGELUTrainingArguments, model: nn.Module, engine: bool = False) -> None:
    """Raises ValueError where a run's way to compute does not let the penalty see what enters the activations.

    Args:
        engine: whether accelerate's own config has FSDP or DeepSpeed, of which the arguments do not know.
    """
    compiled = args.torch_compile or any(map(is_compiled, model.modules()))
    reasons = {
        "torch.compile, whose code does not know hooks: train without torch_compile": compiled,
        "torch.nn.DataParallel, which copies the model: start one process per device by torchrun, or show it one by "
        "CUDA_VISIBLE_DEVICES": args.n_gpu > 1,
        "FSDP and DeepSpeed, with which it was not tested: train by DistributedDataParallel": args.fsdp
        or args.deepspeed
        or engine,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"sparsity_penalty={args.sparsity_penalty:g} does not go with {reason}, or set sparsity_penalty=0"
            )
