"""Proves that ReLU is what runs after substitution: without hooks, the outputs are those of the gates as ReLU before it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import hardness_sites
from ..measurement.batches import CalibrationError
from ..measurement.change import first_example
from ..measurement.difference import difference, tolerance
from ..measurement.examples.choice import example_inputs
from ..measurement.forward import measuring, run_batch, same_random_numbers
from ..measurement.in_effect import check_in_effect, counting_calls
from ..structure.modules import transformers_parts
from ..structure.second_records import padding_unpacked
from .gates import gates_as_relu

# kernels of accelerators round otherwise than the operations that they fuse (TF32)
_SLACK_ELSEWHERE = 100.0

# {model: (a batch, the main output of its first example with the gates as ReLU)}
Runs = Mapping[nn.Module, tuple[Mapping[str, Any], Tensor]]


def runs_by_part(model: nn.Module) -> Runs:
    """A run of each transformers model in `model` that a small batch can be made for.

    Raises:
        CalibrationError: a site is not what runs.
    """
    found: dict[nn.Module, tuple[Mapping[str, Any], Tensor]] = {}
    for part in transformers_parts(model).values():
        if hardness_sites(part) and all(map(_is_whole, part.parameters())):
            try:
                batch = example_inputs(part)
                found[part] = batch, run_as_relu(part, batch)
            except CalibrationError:
                raise
            except Exception:  # modelling code of any kind: where nothing can be run, nothing can be shown
                continue
    return found


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether it is here: offloaded, a run would cost much; sharded, it would need other processes."""
    return type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0


def check_relu_runs(runs: Runs) -> None:
    """ValueError if the models, which hold ReLU in the place of the gates by now, put out something else."""
    for model, (batch, expected) in runs.items():
        if bool(torch.isnan(expected).any()):  # shows nothing, and the measured change is NaN, which says so
            continue
        got = _output(model, batch)
        allowed = tolerance([got]) * (1.0 if got.device.type == "cpu" else _SLACK_ELSEWHERE)
        moved = difference([expected], [got])
        if not moved <= allowed:
            raise ValueError(
                f"{type(model).__name__} does not run the ReLUs that were put into it: its output differs by {moved:.2g} "
                "(relative) from the one with the gates as ReLU. A module keeps another record of its activation, or a "
                "fused kernel runs in the activation's place: switch it off. The model is as it was"
            )


def run_as_relu(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The main output of the first example of the batch, with the gates as ReLU; CalibrationError if some do not run."""
    called: set[str] = set()
    with gates_as_relu(model), counting_calls(model, called):
        output = _output(model, batch)
    check_in_effect(model, called, partial(_output, model, batch))
    return output


def _output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    with measuring(model), torch.no_grad(), padding_unpacked(model), same_random_numbers(model):
        return first_example(run_batch(model, copies, 0))
