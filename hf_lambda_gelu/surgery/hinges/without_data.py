"""Hinges without data: the same for every neuron, by minimax over the whole line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...measurement.batches import FORWARD_ERRORS, check_dealt, model_batches
from ...measurement.examples.choice import example_inputs
from ...measurement.forward import run_batch
from ...measurement.team import ALONE, Team
from ...structure.modules import transformers_parts
from ...structure.scratch import scratch_folder
from ..refit.refit_shards import refit_weights
from ..refit.two_networks import TwoNetworks
from .plan import HingeError
from .wanted import Wanted
from .work import HingeWork


@contextmanager
def minimax_hinges(
    model: nn.Module, calibration: Iterable[Any] | None, wanted: Wanted, team: Team = ALONE
) -> Iterator[HingeWork]:
    """Within the block, `networks.substituted()` has minimax hinges in the place of all gates, and afterwards the model.

    Args:
        calibration: batches that the block may want; the first one shows where the maps are. None for one that is made up.
        team: whose processes each have their own share of the batches.
    """
    with scratch_folder() as folder:
        networks = TwoNetworks(model, folder, refit_weights(model, folder, team.all_did), team)
        work = HingeWork(networks, wanted)
        try:
            if calibration is None:
                run = made_up_run(model)
            else:
                check_dealt(calibration, team)
                networks.batches.keep(model_batches(model, calibration, team))
                run = networks.forward_of_all(0)
            if networks.weights is not None:
                networks.weights.read_journal()
            networks.biases.add(*work.plan(run))
            work.widen_all()
            networks.hard = set(networks.sites)
            yield work
            networks.leave()
            networks.commit()
        except BaseException:
            networks.undo()
            raise


def made_up_run(model: nn.Module) -> Callable[[], Any]:
    """A run of each transformers model in `model` on a small batch."""
    parts = list(transformers_parts(model).values())
    if not parts:
        raise HingeError(
            f"{type(model).__name__} is no transformers model: pass calibration=…, a batch that shows how its maps run"
        )
    try:
        batches = [(part, example_inputs(part)) for part in parts]
    except FORWARD_ERRORS as error:
        raise HingeError(f"where its maps are is seen in a run: pass calibration=…, a batch or more ({error})") from error
    return lambda: [run_batch(part, dict(batch), 0) for part, batch in batches]
