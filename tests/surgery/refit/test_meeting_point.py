"""Where a map's output meets the stream, and by which scale, against tables and against stock models that a hook moves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support import tiny
from support.handmade import embeds, stack
from support.models import converted
from support.site_tables import ALBERT, WHERE, Where, both
from support.states import hooks
from support.traced import found
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.towers import Towers
from hf_lambda_gelu.surgery.refit.capture import capture
from hf_lambda_gelu.surgery.refit.chains import Chain
from hf_lambda_gelu.surgery.refit.meeting_point import find_meeting
from hf_lambda_gelu.surgery.refit.runs import Run


@torch.no_grad()
def moved(
    stock: PreTrainedModel, block: str, module: str, taker: str, scale: Tensor, channels_first: bool
) -> tuple[Tensor, Tensor]:
    """The change of the stream of a stock model when the map's output moves by a vector, and scale ⊙ the vector."""
    seen: list[Tensor] = []

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    owner = stock.get_submodule(block)
    if module == "output":
        watch = owner.register_forward_hook(lambda _, args, output: seen.append(first(output).clone()))
    else:
        watch = owner.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    vector = torch.randn(len(scale), generator=torch.Generator().manual_seed(1))
    stock(**tiny.inputs(stock))
    conv = isinstance(stock.get_submodule(taker), nn.Conv1d)
    push = stock.get_submodule(taker).register_forward_hook(lambda _, args, y: y + (vector[:, None] if conv else vector))
    stock(**tiny.inputs(stock))
    watch.remove()
    push.remove()
    change = seen[1] - seen[0]
    change = change.movedim(1, -1) if channels_first else change
    return change, (scale * vector).expand_as(change)


@torch.no_grad()
def meeting_of(model: PreTrainedModel, block: str, site: str, batch: dict[str, Tensor]) -> Any:
    (linear,) = found(model, batch).maps[site]
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch = {**batch, "use_cache": False}  # a cache would grow from run to run
    call = capture(model, Chain([block], [[site]]), lambda: model(**batch))[1][0]
    module = model.get_submodule(block)
    return find_meeting(Run(module, lambda: call.run(module), Towers(model, hlg.hardness_sites(model).values())), linear)


CASES = [
    pytest.param(name, where, id=f"{name}-{where.site}")
    for name, wheres in WHERE.items()
    for where in wheres
    if where.block != ALBERT  # it runs three times
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "where"), CASES)
def test_meeting(name: str, where: Where, dtype: torch.dtype) -> None:
    """Module and layer scale against the table, and against a stock model in which a hook moves the map's output."""
    model, stock = converted(name, dtype=dtype), tiny.build(name)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs(model).items()}
    for n, (site, taker, block) in enumerate(zip(both(where.site), both(where.taker), both(where.block), strict=True)):
        meeting = meeting_of(model, block, site, batch)
        assert hooks(model) == []
        if not where.meeting:
            assert meeting is None
            continue
        assert meeting is not None
        module = where.meeting[n % len(where.meeting)]
        assert meeting.module == (None if module == "output" else module)
        assert meeting.moved == where.moved
        width = stock.get_submodule(taker).weight.shape[1 if name == "gpt2" else 0]
        scale = stock.get_submodule(block).get_parameter(where.scale) if where.scale else torch.ones(width)
        torch.testing.assert_close(
            meeting.scale.float(), scale.detach(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.02
        )
        if dtype == torch.float32:
            torch.testing.assert_close(*moved(stock, block, module, taker, scale, where.moved), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 768])
def test_meeting_of_one_row(width: int, dtype: torch.dtype) -> None:
    """One token of one example: for a single row all that a norm does is a scale, which is not taken for one."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**tiny.TEXT, "hidden_size": width, "num_hidden_layers": 1}))
    hlg.convert(model)
    site = "encoder.layer.0.intermediate.intermediate_act_fn"
    meeting = meeting_of(model.eval().to(dtype), "encoder.layer.0", site, {"input_ids": torch.tensor([[5]])})
    assert meeting.module == "output.LayerNorm"
    torch.testing.assert_close(meeting.scale.float(), torch.ones(width), rtol=0, atol=0.02)


@pytest.mark.parametrize(("kind", "wanted"), [("pre", "output"), ("post", "norm"), ("wiped", "norm"), ("gated", "")])
def test_meeting_of_blocks(kind: str, wanted: str) -> None:
    """Block output for the norm first, the norm's input for the norm last, nothing where each row is scaled differently."""
    model = stack(kind, "pre")
    meeting = meeting_of(model, "front.0", "front.0.act", embeds())
    assert ("" if meeting is None else meeting.module or "output") == wanted
