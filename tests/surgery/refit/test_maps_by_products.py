"""Refit and fold of maps that are no `F.linear`: against a twin that computes the same by `F.linear`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.models import randomized
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import hf_lambda_gelu as hlg

Product = Callable[[Tensor, nn.Parameter], Tensor]

# how h (2, 5, 12) is multiplied by W (8, 12), or by W (12, 8)
PRODUCTS: dict[str, tuple[bool, Product]] = {
    "x @ W": (True, lambda h, w: h @ w),
    "x @ W.T": (False, lambda h, w: h @ w.T),
    "W @ x": (False, lambda h, w: (w @ h.mT).mT),
    "einsum": (True, lambda h, w: torch.einsum("bnd,dk->bnk", h, w)),
    "einsum that turns": (False, lambda h, w: torch.einsum("kd,bnd->knb", w, h).permute(2, 1, 0)),
    "tensordot": (True, lambda h, w: torch.tensordot(h, w, dims=([2], [0]))),
}


class Block(nn.Module):
    """A residual block whose second map is the test's."""

    def __init__(self, product: Product, turned: bool) -> None:
        super().__init__()
        self.norm, self.first, self.act = nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU()
        self.weight = nn.Parameter(torch.randn(12, 8) if turned else torch.randn(8, 12))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return x + self.product(self.act(self.first(self.norm(x))), self.weight)


def network(product: Product, turned: bool) -> nn.Module:
    """Two blocks and a head; the same numbers whatever the product."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(F.linear, False), Block(F.linear, False), nn.Linear(8, 3))
    weights = [block.weight.detach() for block in model[:2]]
    for index, weight in enumerate(weights):
        model[index].weight = nn.Parameter(weight.T.contiguous() if turned else weight)
        model[index].product = product
    return model.eval()


def batches() -> list[Tensor]:
    return [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]


@pytest.mark.parametrize("what", PRODUCTS)
def test_refit(what: str) -> None:
    """The weights are those of the twin; both differ from what they were."""
    turned, product = PRODUCTS[what]
    model, twin = network(product, turned), network(F.linear, False)
    before = twin[0].weight.detach().clone()
    sites = []
    for network_ in (model, twin):
        hlg.convert(network_)
        report = hlg.relu_ize(network_, calibration=batches(), compensate="least_squares").compensation
        assert report is not None
        sites.append([(site.name, site.weight, site.target, site.rows) for site in report.sites])
    assert sites[0] == sites[1]
    for index in range(2):
        weight = model[index].weight.T if turned else model[index].weight
        torch.testing.assert_close(weight, twin[index].weight, rtol=1e-4, atol=1e-5)
    assert float((twin[0].weight - before).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("what", PRODUCTS)
def test_fold(what: str) -> None:
    """λ into the weights, as in the twin: rows before, all of the map after."""
    turned, product = PRODUCTS[what]
    model, twin = network(product, turned), network(F.linear, False)
    for network_ in (model, twin):
        hlg.convert(network_)
        tiny.set_hardness(network_, 3.0, 1.0)  # type: ignore[arg-type]
        hlg.fold(network_, batches()[0])
    for index in range(2):
        weight = model[index].weight.T if turned else model[index].weight
        torch.testing.assert_close(weight, twin[index].weight)
        torch.testing.assert_close(model[index].first.weight, twin[index].first.weight)


class Experts(nn.Module):
    """Three experts in one parameter, each with tokens of its own; by one product, or one after the other."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.SiLU(), nn.Parameter(torch.randn(3, 12, 8))
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(3, -1, 8)
        if self.stacked:
            return torch.bmm(self.act(torch.bmm(h, self.up)), self.down).view(x.shape)
        made = [F.linear(self.act(F.linear(h[i], self.up[i].T)), self.down[i].T) for i in range(3)]
        return torch.stack(made).view(x.shape)


def test_experts() -> None:
    """A product of stacks is one map for each expert, as where they run one after the other; each is fitted by itself."""
    model, twin = Experts(stacked=True).eval(), Experts(stacked=False).eval()
    data = [torch.randn(3, 100, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    down, up = model.down.detach().double(), model.up.detach().double()
    for network_ in (model, twin):
        hlg.convert(network_)
        report = hlg.relu_ize(network_, calibration=data, compensate="least_squares").compensation
        assert report is not None
        assert ([site.weight for site in report.sites], report.uncompensated) == (["down"], {})
    torch.testing.assert_close(model.down, twin.down)
    x = torch.cat(data, 1).double()
    for i in range(3):  # least squares of each expert by numpy's solver, with hardly a ridge
        hard = torch.relu(x[i] @ up[i])
        wanted = F.silu(x[i] @ up[i]) @ down[i]
        best = torch.linalg.lstsq(hard, wanted).solution
        error, least, naive = ((hard @ w - wanted).norm() for w in (model.down[i].detach().double(), best, down[i]))
        assert float(error) <= 1.05 * float(least)
        assert float(naive) > 1.2 * float(least)


@pytest.mark.parametrize("name", ["falcon", "llama4_text", "aria_text"])
def test_architectures(name: str) -> None:
    """The outputs move less with the refit than without; Falcon multiplies by W.T, the others by bmm."""
    gated = {key: value for key, value in tiny.GATED.items() if key != "head_dim"}
    sizes = {**gated, "intermediate_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    extra = {
        "falcon": {"ffn_hidden_size": 40, "tie_word_embeddings": True},
        "llama4_text": {"num_local_experts": 3, "intermediate_size_mlp": 40, "num_experts_per_tok": 1},
        "aria_text": {"moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1},
    }[name]
    model = randomized(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **extra})))
    batches_ = [{"input_ids": torch.randint(3, 99, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(9)]
    naive = copy.deepcopy(model)
    wanted = model(**batches_[0]).logits.detach()
    report = hlg.relu_ize(model, calibration=batches_[1:], compensate="least_squares").compensation
    assert report is not None
    assert report.uncompensated == {}
    assert all("down" in site.weight or "dense_4h_to_h" in site.weight for site in report.sites)
    hlg.relu_ize(naive, force=True)
    errors = [float((m(**batches_[0]).logits.detach() - wanted).norm()) for m in (model, naive)]
    assert errors[0] < 0.9 * errors[1]
