"""Chains of blocks and the arguments that reach them, against tables that were read off the modelling code by hand."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from support.handmade import embeds, stack
from support.models import converted
from support.site_tables import ALBERT, WHERE, both
from support.states import hooks
from support.traced import found
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel, SwinConfig, SwinModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.tracing import trace
from hf_lambda_gelu.surgery.refit.blocks import has_mark, with_hidden, without_hidden
from hf_lambda_gelu.surgery.refit.capture import capture
from hf_lambda_gelu.surgery.refit.chains import Chain, find_chains


def test_forward_that_raises() -> None:
    """No hook stays, and no watcher either, when the forward raises in the middle."""
    model = converted("bert")

    def forward() -> None:
        model(**tiny.inputs(model))
        raise KeyError

    with pytest.raises(KeyError):
        trace(model, forward)
    with pytest.raises(KeyError):
        find_chains(model, forward, {})
    result = found(model)
    with pytest.raises(KeyError):
        find_chains(model, forward, result.maps)
    block = Chain(["bert.pooler", "bert.encoder.layer.1"], [[], []])
    with pytest.raises(KeyError):
        capture(model, block, forward)  # there is no pooler
    assert hooks(model) == []
    outputs = model(**tiny.inputs(model)).logits
    assert outputs.grad_fn is not None
    assert not any(p.grad is not None for p in model.parameters())


def planned(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> list[Chain]:
    result = found(model, batch)
    batch = tiny.inputs(model) if batch is None else batch
    with torch.no_grad():
        return find_chains(model, lambda: model(**batch), {s: result.maps[s] for s in result.order if s in result.maps})


@pytest.mark.parametrize("name", tiny.MODELS)
def test_chains(name: str) -> None:
    """All layers of a stack are in one chain, encoder and decoder in two, towers in two; ALBERT's one layer is pooled."""
    model = converted(name)
    before = tiny.snapshot(model)
    wanted = [Chain(both(where.block), [[site] for site in both(where.site)], name == "albert") for where in WHERE[name]]
    if name == "wav2vec2":  # both sites of its convolutions are in the whole model, which is one block
        wanted[:2] = [Chain([""], [wanted[0].sites[0] + wanted[1].sites[0]])]
    assert planned(model) == wanted
    assert tiny.snapshot(model) == before
    assert hooks(model) == []


def test_chains_of_more() -> None:
    """Eleven layers are one chain; of a stage with two blocks both sites are in one step."""
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**{**tiny.TEXT, "num_hidden_layers": 11}))
    hlg.convert(bert)
    (chain,) = planned(bert.eval(), {"input_ids": torch.tensor([[5, 6]])})
    assert chain.blocks == [f"encoder.layer.{n}" for n in range(11)]
    assert [len(sites) for sites in chain.sites] == [1] * 11
    swin = SwinModel(SwinConfig(**{**tiny.STAGES, "depths": [2, 3]}))
    hlg.convert(swin)
    (chain,) = planned(swin.eval())
    assert chain.blocks == both("encoder.layers.{}")
    assert chain.sites == [
        [f"encoder.layers.{stage}.blocks.{n}.mlp.activation_fn" for n in range(depth)] for stage, depth in enumerate((2, 3))
    ]
    assert [(c.blocks, c.sites) for c in chain.split()] == [
        ([block], [sites]) for block, sites in zip(chain.blocks, chain.sites, strict=True)
    ]


def test_chains_of_stacks() -> None:
    """Blocks without sites are left out at a chain's ends and kept within; what is not handed on as it is ends a chain."""
    model = stack("plain", "pre", "plain", "post", "plain", back=("pre", "gated"))
    front, back = planned(model, embeds())
    assert front == Chain(["front.1", "front.2", "front.3"], [["front.1.act"], [], ["front.3.act"]])
    assert back == Chain(["back.0", "back.1"], [["back.0.act"], ["back.1.act"]])
    flipped = planned(stack("pre", "pre", way="flipped"), embeds())
    assert flipped == [Chain(["front.0"], [["front.0.act"]]), Chain(["front.1"], [["front.1.act"]])]
    (turned,) = planned(stack("pre", "plain", "post", way="reversed"), embeds())
    assert turned == Chain(["front.2", "front.1", "front.0"], [["front.2.act"], [], ["front.0.act"]])
    assert front.split() == [Chain(["front.1"], [["front.1.act"]]), Chain(["front.3"], [["front.3.act"]])]


def test_capture() -> None:
    """The arguments of each block, and that the pass ends at the last block: what comes after it does not run."""
    model, batch = converted("bert"), tiny.inputs(converted("bert"))
    with torch.no_grad():
        hidden = tiny.build("bert")(**batch, output_hidden_states=True).hidden_states
    ran: list[str] = []
    watched = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("bert.encoder.layer.0", "bert.encoder.layer.1", "cls")
    ]
    with torch.no_grad():
        chain = Chain(both("bert.encoder.layer.{}"), [[], []])
        names, calls, samples = capture(model, chain, lambda: model(**batch))
    assert (names, samples) == (chain.blocks, [None, None])
    assert ran == ["bert.encoder.layer.0"]
    for handle in watched:
        handle.remove()
    for index, (call, wanted) in enumerate(zip(calls, hidden, strict=False)):
        if index:  # the hidden state of the first is enough: memory does not grow with the chain
            assert has_mark(call.arguments)
            call = call.with_hidden(wanted)
        rest, taken = without_hidden(call.arguments)
        torch.testing.assert_close(taken, wanted, rtol=1e-5, atol=1e-5)
        args, kwargs = with_hidden(rest, taken + 1)
        assert torch.equal(args[0], taken + 1)
        assert {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}.keys() == {
            k for k, v in call.arguments[1].items() if isinstance(v, Tensor)
        }
    albert = converted("albert")
    with torch.no_grad():
        pooled = capture(albert, Chain([ALBERT], [[]], pooled=True), lambda: albert(**batch))[1]
    assert len(pooled) == 3
    assert hooks(model) == hooks(albert) == []
