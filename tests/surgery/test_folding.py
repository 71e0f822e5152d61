"""`fold`: stock transformers loads what is left and computes what the λ-GELU model computed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import tiny
from support.stock import stock_outputs
from torch import Tensor, nn
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import hf_lambda_gelu as hlg

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
# parts of the reason; sites that stay. A LayerNorm follows two of them, whose ε counts at this scale
REFUSED = {
    "modernbert": (("head.act", "outputs would change"), ("head.act",)),
    "wav2vec2": (
        ("encoder.pos_conv_embed.activation: a weight next to it is no parameter", "λ of 1 of 5"),
        ("encoder.pos_conv_embed.activation", "feature_extractor.conv_layers.1.activation"),
    ),
}
MORE = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**{**TEXT, "intermediate_size": 40}, num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=2)
    ),
    "convnextv2": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(image_size=32, num_stages=2, hidden_sizes=[16, 32], depths=[1, 1])
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 32], depths=[1, 1], hidden_act="gelu", layer_type="bottleneck")
    ),
}


def build(name: str) -> PreTrainedModel:
    if name not in MORE:
        return tiny.build(name)
    torch.manual_seed(0)
    model = MORE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


class Folded(NamedTuple):
    hard: list[Tensor]
    report: hlg.FoldReport
    config: dict
    before: dict
    stock: list[Tensor]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folded]:
    root, made, batches = tmp_path_factory.mktemp("fold"), {}, {}
    for name in [*tiny.MODELS, *MORE]:
        if name in REFUSED:
            continue
        model = build(name)
        before, batch = model.config.to_dict(), tiny.inputs(model)
        hlg.convert(model)
        tiny.set_hardness(model, 1.37, step=0.83)
        hard = tiny.outputs(model, batch)
        report = hlg.fold(model, batch)
        model.save_pretrained(root / name)
        made[name] = hard, report, model.config.to_dict(), before
        batches[name] = type(model).__name__, batch
    stock = stock_outputs(batches, root)
    return {name: Folded(*values, stock[name]) for name, values in made.items()}


@pytest.mark.parametrize("name", [n for n in (*tiny.MODELS, *MORE) if n not in REFUSED])
def test_stock_reload(name: str, folded: dict[str, Folded]) -> None:
    """The checkpoint has the config that it came with, and the function that λ gave it."""
    hard, report, config, before, stock = folded[name]
    assert tiny.relative_difference(hard, stock) <= 1e-5
    assert report.difference <= 1e-5
    changed = {key for key in config if config[key] != before.get(key)}
    assert changed <= {"architectures", "dtype"} | ({"feed_forward_proj"} if name == "t5" else set())  # gated-gelu_new now
    smooth = tiny.outputs(build(name), tiny.inputs(build(name)))
    assert tiny.relative_difference(smooth, hard) > 1e-3, "λ does not matter here"


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What cannot hold is refused, and nothing has changed."""
    model = build(name)
    hlg.convert(model)
    tiny.set_hardness(model, 1.37, step=0.83)
    before = tiny.snapshot(model)
    with pytest.raises(hlg.FoldError) as error:
        hlg.fold(model, tiny.inputs(model))
    parts, stay = REFUSED[name]
    assert all(part in str(error.value) for part in parts), error.value
    assert tiny.snapshot(model) == before
    others = [site for site in hlg.hardness_sites(model) if not site.endswith(stay)]
    assert list(hlg.fold(model, tiny.inputs(model), only=others).sites) == others
    assert len(hlg.hardness_sites(model)) == len(stay)


class Block(nn.Module):
    """An MLP that can also use its pre-activation, or its activation, a second time."""

    def __init__(self, again: str = "", norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(8, 16), hlg.LambdaGELU(5.0), nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.again = again
        if norm:
            nn.init.normal_(self.norm.weight)
            nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.first(x))
        h = self.act(z)
        if self.again == "activation added to a stream":
            return self.second(h + x.repeat(1, 2))
        return self.second(h) + (z[:, :8] if self.again == "pre-activation" else h[:, :8] if self.again else 0.0)


@pytest.mark.parametrize("norm", [False, True])
def test_by_the_formula(norm: bool) -> None:
    """W₁, b₁ × λ and W₂ ÷ λ, b₂ as it was; behind a normalisation its weight and bias in place of W₁, b₁."""
    block = Block(norm=norm).eval()
    start = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(5, 8)
    expected = block(x)
    report = hlg.fold(block, x)
    maker = "norm" if norm else "first"
    assert report.scaled == {"act": (f"{maker}.weight", f"{maker}.bias")}
    assert report.divided == {"act": ("second.weight",)}
    assert type(block.act).__name__ == "GELUActivation"
    after = block.state_dict()
    for key, factor in {f"{maker}.weight": 5.0, f"{maker}.bias": 5.0, "second.weight": 0.2}.items():
        torch.testing.assert_close(after.pop(key), start[key] * factor, rtol=1e-6, atol=0)
    assert all(torch.equal(value, start[key]) for key, value in after.items())
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_power_of_two_is_exact_in_the_weights() -> None:
    """Unfolding gives the weights back to the bit, in bf16 too."""
    block = Block().to(torch.bfloat16)
    block.act.set_hardness(2.0**14)
    start = block.first.weight.clone()
    hlg.fold(block, torch.randn(5, 8, dtype=torch.bfloat16))
    assert torch.equal(block.first.weight / 2.0**14, start)
    x = torch.randn(100, 8, dtype=torch.bfloat16)
    z = block.first(x) / 2.0**14
    torch.testing.assert_close(block(x), block.second(z.relu() * 2.0**14), atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("again", ["pre-activation", "activation", "activation added to a stream"])
def test_other_uses(again: str) -> None:
    """A pre-activation or activation that is used elsewhere too: refused, weights as they were."""
    block = Block(again)
    block.first.weight.requires_grad_(False)
    start = {k: v.clone() for k, v in block.state_dict().items()}
    with pytest.raises(hlg.FoldError, match=r"act.*mixed|because of act"):
        hlg.fold(block, torch.randn(5, 8))
    assert all(torch.equal(value, start[key]) for key, value in block.state_dict().items())
    assert [p.requires_grad for p in block.parameters()] == [False, True, True, True, True]
    assert not block.act._forward_hooks


def test_shared_weights() -> None:
    """One weight that serves two sites can hold one λ only."""
    first, second = Block(), Block()
    second.first.weight = first.first.weight
    both = nn.Sequential(first, second)
    x = torch.randn(5, 8)
    with pytest.raises(hlg.FoldError, match=r"first\.weight is shared with 1\.first\.weight"):
        hlg.fold(both, x)
    twice = nn.Sequential(first, first)  # the same block: one site, called twice
    expected = twice(x)
    assert list(hlg.fold(twice, x).sites) == ["0.act"]
    torch.testing.assert_close(twice(x), expected, rtol=1e-5, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(ValueError, match="has no λ-GELU to fold: call convert"):
        hlg.fold(tiny.build("bert"))
    with pytest.raises(ValueError, match="pass inputs="):
        hlg.fold(Block())
    with pytest.raises(ValueError, match="no λ-GELU called 'gate': the model has act"):
        hlg.fold(Block(), torch.randn(1, 8), only=["gate"])
    with pytest.raises(ValueError, match="meta device"), torch.device("meta"):
        hlg.fold(Block(), torch.randn(1, 8))
    with pytest.raises(hlg.FoldError, match="0: it takes the model's input itself"):
        hlg.fold(nn.Sequential(hlg.LambdaGELU(2.0), nn.Linear(8, 8)), torch.randn(1, 8))
    with pytest.raises(hlg.FoldError, match="no linear map takes up its output"):
        hlg.fold(nn.Sequential(nn.Linear(8, 8), hlg.LambdaGELU(2.0)), torch.randn(1, 8))
    with pytest.raises(hlg.FoldError, match="stands between it"):
        hlg.fold(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), hlg.LambdaGELU(2.0), nn.Linear(8, 8)), torch.randn(1, 8))


def test_report_text() -> None:
    assert str(hlg.fold(Block(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))).splitlines()[1:] == [
        "  act: λ = 5 into first.weight, first.bias; 1/λ into second.weight"
    ]


def test_real_model(asset, tmp_path: Path) -> None:
    """MiniLM at λ = 160 and at a power of two."""
    from transformers import AutoModel

    for value in (159.58, 256.0):
        model = AutoModel.from_pretrained(asset("minilm")).eval()
        hlg.convert(model)
        for site in hlg.hardness_sites(model).values():
            site.set_hardness(value)
        assert hlg.fold(model).difference < 1e-5
        assert not hlg.hardness_sites(model)
        assert model.config.hidden_act == "gelu"
