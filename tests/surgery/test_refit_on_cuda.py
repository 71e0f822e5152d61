"""Conversion, refit and fold of models that are on a GPU, against the same on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny

import hf_lambda_gelu as hlg

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama", "vit"])
def test_refit(name: str) -> None:
    """The refit on a GPU gives the CPU's weights, and leaves all on the GPU."""
    model = tiny.build(name)
    batches = [tiny.inputs(model, seed) for seed in range(4)]
    hlg.convert(model, 1.3)
    there = copy.deepcopy(model).cuda()
    mine = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    theirs = hlg.relu_ize(
        there, calibration=[{k: v.cuda() for k, v in batch.items()} for batch in batches], compensate="least_squares"
    )
    assert [site.method for site in theirs.compensation.sites] == [site.method for site in mine.compensation.sites]
    for (key, wanted), got in zip(model.state_dict().items(), there.state_dict().values(), strict=True):
        assert got.is_cuda, key
        torch.testing.assert_close(got.cpu(), wanted, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_fold() -> None:
    model = tiny.build("bert")
    batch = tiny.inputs(model)
    hlg.convert(model, 1.3)
    wanted = model.eval()(**batch)[0]
    there = copy.deepcopy(model).cuda()
    hlg.fold(there, {k: v.cuda() for k, v in batch.items()})
    torch.testing.assert_close(there(**{k: v.cuda() for k, v in batch.items()})[0].cpu(), wanted, rtol=1e-3, atol=1e-4)
