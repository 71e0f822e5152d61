"""What is put out at padding counts in no change of the outputs, whatever says that it is padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny
from support.models import hardened, stock_relu

import hf_lambda_gelu as hlg

SOUNDS = torch.arange(400)[None] < torch.tensor([[300], [400]])
TOKENS = torch.arange(7)[None] < torch.tensor([[4], [7]])
ADDITIVE = torch.where(torch.arange(11)[None] < torch.tensor([[8], [11]]), 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("name", "more", "kept"),
    [
        # of 400 samples the convolutions make 39 frames, of 300 they make 29
        ("wav2vec2", {"attention_mask": SOUNDS.long()}, [29, 39]),
        ("t5", {"decoder_input_ids": torch.where(TOKENS, 5, 0)}, [4, 7]),
        ("bert", {"attention_mask": ADDITIVE[:, None, None]}, [8, 11]),
    ],
)
def test_outputs_at_padding(name: str, more: dict[str, torch.Tensor], kept: list[int]) -> None:
    model = hardened(name, 1.0)
    twin, batch = stock_relu(name, model), {**tiny.inputs(model), **more}
    with torch.no_grad():
        before, after = (
            np.concatenate([x[:n] for x, n in zip(m(**batch).logits.double().numpy(), kept, strict=True)])
            for m in (model.eval(), twin.eval())
        )
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    report = hlg.relu_ize(model, force=True, calibration=[batch])
    assert expected > 0
    assert report.relative_change == pytest.approx(expected, rel=1e-4)
