"""What a refit costs: runs of blocks, tensors that live, files while it lasts."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from support.models import converted
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import engine

Batches = list[dict[str, Tensor]]


def test_cost_is_linear_in_depth() -> None:
    """Blocks run about twice as often in a network twice as deep, and the loader is iterated once."""
    counts = []
    for layers in (4, 8):
        torch.manual_seed(0)
        model = BertModel(BertConfig(**{**tiny.TEXT, "num_hidden_layers": layers})).eval()
        hlg.convert(model)
        ran: list[int] = []
        for block in model.encoder.layer:
            block.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        drawn: list[int] = []

        def loader(batches: Batches, drawn: list[int] = drawn) -> Iterator[dict[str, Tensor]]:
            for seed, batch in enumerate(batches):
                drawn.append(seed)
                yield batch

        hlg.relu_ize(model, calibration=loader(calibration_set(model, 4)), compensate="least_squares")
        assert drawn == [0, 1, 2, 3]
        counts.append(len(ran))
    assert counts[1] / counts[0] < 2.1
    assert counts[0] < 4 * 4 * 9  # layers × batches × runs of each


def test_batches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's tensors are released as it goes on; and no more hidden states live at a time with more batches."""
    original = engine.observe

    def peak(count: int) -> int:
        model, alive, live = converted("bert-classifier"), list[weakref.ref[Tensor]](), list[int]()

        def loader() -> Iterator[dict[str, Tensor]]:
            for seed in range(count):
                ids = tiny.inputs(model, seed)["input_ids"]
                alive.append(weakref.ref(ids))
                yield {"input_ids": ids}
                del ids
                assert sum(ref() is not None for ref in alive) <= 2

        def observe(*args: Any) -> Any:
            assert all(ref() is None for ref in alive)
            gc.collect()
            hidden = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (2, 11, 32)]
            live.append(len(hidden))
            return original(*args)

        monkeypatch.setattr(engine, "observe", observe)
        hlg.relu_ize(model, calibration=loader(), compensate="least_squares")
        assert len(live) == 2 * 2 * count
        return max(live)

    gc.collect()
    gc.freeze()  # objects of before need not be looked through
    few, many = peak(4), peak(12)
    assert 0 < many <= few + 2


def test_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration set is kept on disk for the time of the call, and gone afterwards, also after a failure."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0

    def loader(model: PreTrainedModel, count: int) -> Iterator[dict[str, Tensor]]:
        nonlocal most
        for seed in range(6):
            if seed == count:
                raise KeyError
            yield tiny.inputs(model, seed)
            most = max(most, len(list(tmp_path.rglob("*.safetensors"))))

    model = converted("bert-classifier")
    with pytest.raises(KeyError):
        hlg.relu_ize(model, calibration=loader(model, 3), compensate="bias")
    assert list(tmp_path.iterdir()) == []
    hlg.relu_ize(model, calibration=loader(model, 6), compensate="bias")
    assert most == 6
    assert list(tmp_path.iterdir()) == []
