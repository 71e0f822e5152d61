"""`convert` where no config governs: plain torch modules, classes that hard-code a GELU, names that are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaModel, activations

import hf_lambda_gelu as hlg


class ByFormula(nn.Module):
    """A GELU under a name that says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Foreign(nn.Module):
    """Not of transformers: known classes, an unknown one, one that is a ReLU, and a transformers model inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), ByFormula(), activations.QuickGELUActivation(), nn.Tanh())
        self.inner = tiny.build("bert")

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.second(self.first(x)).sum() + self.inner(input_ids=ids).logits


FOREIGN = {"first.1": "gelu", "first.3": "silu", "second.1": "gelu_tanh", "second.2": "quick_gelu"}


def test_plain_modules() -> None:
    """By what they compute, whatever they are called; a transformers model inside by its config."""
    model, x, ids = Foreign().eval(), torch.randn(3, 8), torch.randint(3, 99, (1, 5))
    expected = model(x, ids)
    report = hlg.convert(model)
    torch.testing.assert_close(model(x, ids), expected)
    plain = {site.name: site.base for site in report.sites if not site.attribute}
    assert plain == FOREIGN
    assert {site.attribute for site in report.sites} == {"", "inner.hidden_act"}
    assert len(hlg.hardness_sites(model)) == len(report.sites) == 7
    assert model.inner.config.hidden_act == "lambda_gelu"
    assert "no config attribute governs   4 × first.1 … second.2" in str(report)


@pytest.mark.parametrize("init", [1.0, 2.0])
def test_a_block_under_two_names(init: float) -> None:
    """One site, in whose place a fold puts back the GELU that was there, and no other λ-GELU."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model, x = nn.Sequential(block, block), torch.randn(64, 8)
    report = hlg.convert(model, init)
    assert [(site.name, site.was) for site in report.sites] == [("0.1", "GELU")]
    tiny.set_hardness(model, 5.0)
    expected = model(x)
    hlg.fold(model, x)
    assert type(model[1][1]) is nn.GELU
    torch.testing.assert_close(model(x), expected)


def test_hard_coded_converted_when_asked() -> None:
    """BLOOM's own GELU class, governed by nothing; without being asked it is told and left."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)).eval()
    batch = tiny.inputs(model)
    expected, before = tiny.outputs(model, batch), tiny.snapshot(model)
    with pytest.raises(hlg.ConversionError, match=r"not convertible: .*BloomGelu: hard-coded"):
        hlg.convert(model)
    assert tiny.snapshot(model) == before
    report = hlg.convert(model, hard_coded=True)
    assert [(site.name, site.base, site.attribute) for site in report.sites] == [
        ("transformer.h.0.mlp.gelu_impl", "gelu_tanh", ""),
        ("transformer.h.1.mlp.gelu_impl", "gelu_tanh", ""),
    ]
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) <= 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["model", "part"])
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 8))], ids=["script", "trace"])
def test_of_torch_jit(make: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    """Its activations cannot be replaced: said at once, and the model is as it was. An activation by itself can be."""
    compiled = make(nn.Sequential(nn.Linear(8, 8), nn.GELU()))
    model = nn.Sequential(nn.GELU(), compiled) if inside else compiled
    expected = model(torch.ones(1, 8))
    with pytest.raises(hlg.ConversionError, match=f"^{'1' if inside else 'the model'} was made by torch.jit.* made from"):
        hlg.convert(model)
    assert torch.equal(model(torch.ones(1, 8)), expected)
    assert not hlg.hardness_sites(model)
    single = nn.Sequential(nn.Linear(8, 8), make(nn.GELU()))
    assert [site.name for site in hlg.convert(single).sites] == ["1"]


def test_name_that_a_module_keeps() -> None:
    """Mamba hands "silu" to kernels by its name: nothing there is converted, and the reason is told."""
    torch.manual_seed(0)
    model = MambaModel(MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    before = tiny.snapshot(model)
    with pytest.raises(
        hlg.ConversionError, match=r"config\.hidden_act: silu: .*layers\.0\.mixer\.activation keeps its name"
    ):
        hlg.convert(model)
    assert tiny.snapshot(model) == before


def test_only() -> None:
    """A filter takes plain modules one by one, governed ones together; what it takes none of is said."""
    model = Foreign()
    report = hlg.convert(model, only=lambda name, module: name.startswith("first") or name.startswith("inner."))
    assert {site.name for site in report.sites if not site.attribute} == {"first.1", "first.3"}
    assert [i.name for i in report.unconverted if i.reason == "`only` does not take it"] == ["second.1", "second.2"]

    model = tiny.build("modernbert")
    report = hlg.convert(model, only=lambda name, module: "head" in name)
    assert [site.name for site in report.sites] == ["head.act"]
    assert (model.config.hidden_activation, model.config.classifier_activation) == ("gelu", "lambda_gelu")

    model = tiny.build("bert")
    before = tiny.snapshot(model)
    with pytest.raises(
        hlg.ConversionError, match=r"takes .*layer\.1\..* but not .*layer\.0\..*config\.hidden_act governs both"
    ):
        hlg.convert(model, only=lambda name, module: "layer.1" in name)
    with pytest.raises(hlg.ConversionError, match=r"`only` took none of \d+ modules, whose names are like 'bert\."):
        hlg.convert(model, only=lambda name, module: "decoder" in name)
    assert tiny.snapshot(model) == before
    with pytest.raises(hlg.ConversionError, match="expects a torch module, got str"):
        hlg.convert("bert-base-uncased")
