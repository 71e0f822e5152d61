"""torch.set_default_device: what the package makes lies where it is needed, and not where torch's default says.

Without an accelerator the default is meta here, where numbers are lost: what was made there by mistake is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg

Batches = list[dict[str, torch.Tensor]]


def saved(model: PreTrainedModel, batches: Batches, folder: Path) -> None:
    hlg.relu_ize(model, force=True)
    hlg.save_relu_pretrained(model, folder / "relu")
    hlg.verify_relu_pretrained(model, folder / "relu")


# verb → what it does with a converted model at λ = 2
VERBS: dict[str, Callable[[PreTrainedModel, Batches, Path], Any]] = {
    "calibrate": lambda m, b, _: str(hlg.calibrate(m, b)),
    "sensitivity": lambda m, b, _: str(hlg.sensitivity(m, b)),
    "least squares": lambda m, b, _: hlg.relu_ize(m, calibration=b, compensate="least_squares").relative_change,
    "two hinges": lambda m, b, _: hlg.relu_ize(m, calibration=b, compensate="least_squares", hinges=2).relative_change,
    "minimax": lambda m, b, _: hlg.relu_ize(m, force=True, hinges=4).relative_change,
    "harden": lambda m, b, _: hlg.harden(m, b),
    "fold": lambda m, b, _: hlg.fold(m),
    "save and verify": saved,
}


@pytest.fixture
def default_meta() -> Iterator[None]:
    yield
    torch.set_default_device(None)


def outcome(verb: str, name: str, device: str | None, folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    model = tiny.build(name)
    batches = [tiny.inputs(model, seed) for seed in range(6)]
    torch.set_default_device(device)
    hlg.convert(model)
    tiny.set_hardness(model, 2.0)
    found = VERBS[verb](model, batches, folder / f"{device}")
    torch.set_default_device(None)
    return str(found) if isinstance(found, (float, str)) else "", model.state_dict()


@pytest.mark.usefixtures("default_meta")
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("verb", VERBS)
def test_as_without(verb: str, name: str, tmp_path: Path) -> None:
    """To the bit what comes out where no default was set."""
    shown, state = outcome(verb, name, "meta", tmp_path)
    expected, other = outcome(verb, name, None, tmp_path)
    assert shown == expected
    assert [key for key, value in other.items() if not torch.equal(state[key], value)] == []
