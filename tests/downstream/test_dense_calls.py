"""Calls of a sparse network that must be torch's own: several rows, gradients, modes, transforms, many firing units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.sparse_calls import Calls, sequential
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream import sparse_ffn
from hf_lambda_gelu.downstream.crossover import Crossover


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass, which knows torch's operations and no kernel."""


class Cases:
    """Calls of a sparse network that must be torch's own."""

    @staticmethod
    def several_rows(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(torch.ones(2, 6))

    @staticmethod
    def gradients(model: nn.Module) -> Tensor:
        out = model(torch.ones(1, 6))
        out.sum().backward()
        return torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])

    @staticmethod
    def autocast(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(torch.ones(1, 6))

    @staticmethod
    def autocast_of_fp32(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model[2](torch.ones(1, 40))

    @staticmethod
    def subclass(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(torch.ones(1, 6).as_subclass(Marked))

    @staticmethod
    def compiled(model: nn.Module) -> Tensor:
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1, 6))

    @staticmethod
    def float64(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(model).double()(torch.ones(1, 6, dtype=torch.float64))

    @staticmethod
    def function_mode(model: nn.Module) -> Tensor:
        with torch.no_grad(), Watching():
            return model(torch.ones(1, 6))

    @staticmethod
    def vmap(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.func.vmap(model)(torch.ones(3, 1, 6))

    @staticmethod
    def export(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.export.export(model, (torch.ones(1, 6),)).module()(torch.ones(1, 6))

    @staticmethod
    def trace(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.jit.trace(model, torch.ones(1, 6), check_trace=False)(torch.ones(1, 6))


@pytest.mark.parametrize("case", [name for name in vars(Cases) if not name.startswith("_")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_dense_where_it_must_be(case: str, calls: Calls) -> None:
    run = getattr(Cases, case)
    dense = run(sequential())
    model = sequential()
    hlg.sparsify_ffn(model, torch.ones(1, 6))
    out = run(model)
    assert (type(out), out.dtype) == (type(dense), dense.dtype)
    torch.testing.assert_close(out, dense, rtol=1e-6, atol=1e-6)
    assert not calls


def test_unlike_dtypes_are_an_error_still(calls: Calls) -> None:
    model = sequential()
    hlg.sparsify_ffn(model, torch.ones(1, 6))
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        model[2](torch.ones(1, 40, dtype=torch.bfloat16))
    assert not calls


def test_dense_below_the_crossover(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more firing units than pay the product is torch's own, to the bit."""
    model = sequential()
    x = torch.ones(1, 6)
    with torch.no_grad():
        fires = int((model[:2](x) != 0).sum())
        assert 5 < fires < 35
        for most, name in ((fires, "gathered"), (fires - 1, "gathered, dense")):
            calls.clear()
            monkeypatch.setattr(sparse_ffn, "crossover", lambda *_, most=most: Crossover(2.0, 1.0, (most + 0.5) / 40))
            with hlg.sparsify_ffn(model, x) as report:
                assert report.maps[0].pays_from == pytest.approx(1 - (most + 0.5) / 40)
                model(x)
            assert dict(calls) == {name: 1}
