"""Rows that a router chose for an expert: they are found again among all, and counted."""

from __future__ import annotations

import pytest
import torch
from support.counted import counted, ids, mask
from torch import Tensor, nn

from hf_lambda_gelu.measurement.chosen_rows import chosen_rows


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class Experts(nn.Module):
    """A list of experts; tokens that are alike, padding among them, go to one together."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.router, self.experts, self.top = nn.Linear(16, 3), nn.ModuleList(Expert() for _ in range(3)), top

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        chosen, out = self.router(flat).topk(self.top).indices, torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).any(-1).nonzero()[:, 0]
            if len(rows):
                out[rows] = out[rows] + expert(flat[rows])
        return x + out.reshape(x.shape)


class Mixture(nn.Module):
    def __init__(self, top: int) -> None:
        super().__init__()
        self.embed, self.mixture = nn.Embedding(9, 16), Experts(top)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.mixture(self.embed(input_ids))
        return y


@pytest.mark.parametrize("top", [1, 2])
def test_experts_in_a_list(top: int) -> None:
    """Each expert counts the tokens that the router sends there, and the padding apart."""
    torch.manual_seed(0)
    model = Mixture(top).eval()
    batch = {"input_ids": ids(8, 9) % 9, "attention_mask": mask(8, 9, 5)}
    chosen = model.mixture.router(model.embed(batch["input_ids"])).topk(top).indices
    kept = batch["attention_mask"] != 0
    wanted = {}
    for index in range(3):
        sent = (chosen == index).any(-1)
        if sent.any():
            wanted[f"mixture.experts.{index}.act"] = (int((sent & kept).sum()), int((sent & ~kept).sum()))
    assert len(wanted) > 1
    seen = counted(model, batch)
    assert {name: numbers for name, numbers in seen.items() if sum(n or 0 for n in numbers)} == wanted


def test_chosen_rows() -> None:
    """Rows are found again among all, equal ones in their order; rows that are not all there are not guessed."""
    whole = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    whole[10] = whole[3]
    rows = torch.tensor([1, 3, 10, 30, 49])
    found = chosen_rows(whole[rows], whole)
    assert found is not None
    assert torch.equal(found, rows)
    assert chosen_rows(whole[torch.tensor([1, 3, 30])], whole) is None  # the other of two equal rows is not there
    assert chosen_rows(whole[rows] * 1.0001, whole) is None
    assert chosen_rows(whole[rows].double(), whole) is None
