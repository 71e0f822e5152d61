"""Proves that ReLU is what runs after substitution: without hooks, the outputs are those of the gates as ReLU before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import LambdaGELU, hardness_sites
from ..measurement.difference import difference, float_outputs, tolerance
from ..measurement.examples.choice import example_inputs
from ..measurement.forward import evaluating
from ..measurement.in_effect import check_in_effect, counting_calls
from ..structure.edits import replace_module
from ..structure.modules import transformers_parts
from ..structure.second_records import padding_unpacked
from .folding import forward
from .gates import gates_as_relu

# kernels of accelerators round otherwise than the operations that they fuse (TF32)
_SLACK_ELSEWHERE = 100.0


def batches_by_part(model: nn.Module) -> dict[nn.Module, Mapping[str, Any]]:
    """{transformers model in `model`: a small batch that fits it}, of those that one can be made for and that can be run."""
    found: dict[nn.Module, Mapping[str, Any]] = {}
    for part in transformers_parts(model).values():
        if not hardness_sites(part) or any(p.is_meta or not p.numel() or type(p) is not nn.Parameter for p in part.parameters()):
            continue  # offloaded or sharded: a run would cost much, or need other processes
        with contextlib.suppress(Exception):  # modelling code of any kind: where nothing can be run, nothing can be shown
            found[part] = example_inputs(part)
    return found


@contextlib.contextmanager
def relu_is_what_runs(batches: Mapping[nn.Module, Mapping[str, Any]]) -> Iterator[None]:
    """Within the block, ReLU is put in the place of the gates of each of the models; it must run before and after.

    Raises:
        CalibrationError: a gate is not what runs before the block.
        ValueError: after it the outputs are not those of ReLU. The gates are back in their places; configs are not.
    """
    expected = {model: _as_relu(model, batch) for model, batch in batches.items()}
    places = {model: _places(model) for model in batches}
    yield
    for model, batch in batches.items():
        got = _outputs(model, batch)
        allowed = tolerance(expected[model])
        if any(tensor.device.type != "cpu" for tensor in got):
            allowed *= _SLACK_ELSEWHERE
        moved = difference(expected[model], got)
        if not moved <= allowed:
            for name, site in places[model]:
                replace_module(model, name, site)
            raise ValueError(
                f"{type(model).__name__} does not run the ReLUs that it holds: its outputs differ by {moved:.2g} (relative) "
                "from those with the gates as ReLU. A module keeps another record of its activation, or a fused kernel runs "
                "in the activation's place: switch it off"
            )


def _places(model: nn.Module) -> list[tuple[str, LambdaGELU]]:
    return [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LambdaGELU)]


def _as_relu(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    called: set[str] = set()
    with gates_as_relu(model), counting_calls(model, called):
        outputs = _outputs(model, batch)
    with evaluating(model), torch.no_grad():
        check_in_effect(model, called, forward(model, batch))
    return outputs


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    with evaluating(model), torch.no_grad(), padding_unpacked(model):
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return float_outputs(forward(model, copies)())
