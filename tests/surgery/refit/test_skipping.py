"""Blocks that are not run: what they get is found without them, and a last map's change is added to what they put out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from support.states import largest_difference, parameters
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import chain_walk
from hf_lambda_gelu.surgery.refit.ridge import Moments, Pieces
from hf_lambda_gelu.surgery.refit.shift import Shift

COUNT = 6


def batches() -> list[dict[str, Tensor]]:
    drawn = [torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(COUNT)]
    masks = [torch.ones_like(ids) for ids in drawn]
    masks[1][0, 6:] = 0
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(drawn, masks, strict=True)]


def llama() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, mlp_bias=True)).eval()


def refit(model: nn.Module, data: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[int]]:
    """The weights afterwards, and how often each layer ran before the change was measured."""
    ran = [0] * 4
    hlg.convert(model)
    layers: Any = model.get_submodule("model.layers" if isinstance(model, tf.PreTrainedModel) else "layers")
    for number, layer in enumerate(layers):
        part = layer.get_submodule("mlp.down_proj" if isinstance(model, tf.PreTrainedModel) else "down")
        part.register_forward_hook(lambda *_, number=number: ran.__setitem__(number, ran[number] + 1))
    report = hlg.relu_ize(model, calibration=data, compensate="least_squares").compensation
    assert report is not None
    assert "least_squares" in {site.method for site in report.sites[:-1]}
    return parameters(model), ran


def never(*args: Any) -> None:
    raise chain_walk.LookedAtError


def test_equal_to_blocks_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a refit that runs all of it, in fewer runs of each block."""
    got, few = refit(llama(), batches())
    monkeypatch.setattr(chain_walk.ChainWalk, "_capture_skipping", never)
    monkeypatch.setattr(chain_walk, "features_of", lambda *args: None)
    wanted, many = refit(llama(), batches())
    assert largest_difference(got, wanted) < 1e-5
    assert all(f < m for f, m in zip(few, many, strict=True))


def test_shift_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where adding the change gives something else than the block, the block runs."""
    monkeypatch.setattr(chain_walk, "features_of", lambda *args: None)
    wanted, many = refit(llama(), batches())
    monkeypatch.undo()
    applied = Shift.applied
    monkeypatch.setattr(Shift, "applied", lambda self, hidden, features: 1.001 * applied(self, hidden, features))
    got, as_many = refit(llama(), batches())
    assert largest_difference(got, wanted) == 0.0
    assert as_many == many


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x))) * gain
        return x + y


class Gains(nn.Module):
    """Each layer's gain is one, or is computed from the hidden state, or chosen by it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.kind = nn.ModuleList(Layer() for _ in range(4)), kind

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            gain = torch.ones(()) if self.kind != "computed" else 1 + x.mean().square()
            if self.kind == "chosen" and x.mean() > 0.1:
                gain = 2 * gain
            x = layer(x, gain)
        return x


@pytest.mark.parametrize("kind", ["constant", "computed", "chosen"])
def test_arguments_that_depend_on_hidden_states(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run on every batch then, and the refit is that without skipping."""
    data = [{"x": torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(COUNT)]
    skipped: list[bool] = []
    skipping = chain_walk.ChainWalk._capture_skipping

    def seen(self: chain_walk.ChainWalk) -> None:
        try:
            skipping(self)
        except chain_walk.LookedAtError:
            skipped.append(False)
            raise
        skipped.append(True)

    monkeypatch.setattr(chain_walk.ChainWalk, "_capture_skipping", seen)
    got, _ = refit(Gains(kind), data)
    assert skipped[0] is (kind == "constant")
    monkeypatch.setattr(chain_walk.ChainWalk, "_capture_skipping", never)
    wanted, _ = refit(Gains(kind), data)
    assert largest_difference(got, wanted) == 0.0


def test_pieces() -> None:
    """The sums of rows that wait for others are those of all rows, to the rounding of fp32 products; none stays behind."""
    g = torch.Generator().manual_seed(0)
    features, wanted = torch.randn(1000, 300, generator=g).relu(), torch.randn(1000, 7, generator=g)
    pieces = Pieces(Moments.empty(300, 7, torch.device("cpu")), rows=64)
    for start, end in ((0, 10), (10, 10), (10, 400), (400, 401), (401, 1000)):
        pieces.add(features[start:end], wanted[start:end])
        assert 0 <= end - pieces.moments.count < 64
    pieces.finish()
    pieces.finish()
    assert pieces.moments.count == 1000
    r, e = features.double(), wanted.double()
    for name, sums in (("r", r.sum(0)), ("rr", r.T @ r), ("re", r.T @ e), ("ee", e.square().sum(0))):
        assert float((getattr(pieces.moments, name) - sums).norm() / sums.norm()) < 1e-6
    torch.testing.assert_close(pieces.moments.rr, pieces.moments.rr.T, rtol=1e-12, atol=1e-9)
