"""Modules that are not transformers models, and activations that a transformers class hard-codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny
from support.bloom import bloom
from support.stock import stock_outputs
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Net(nn.Module):
    """In the shape that timm's networks have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.Sequential(*[Block(16) for _ in range(3)]), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def data() -> Tensor:
    return torch.randn(64, 10, 16, generator=torch.Generator().manual_seed(0))


BATCHES = {
    "tensors": lambda x: list(x.split(16)),
    "with labels": lambda x: [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(16)],
    "mappings": lambda x: [{"x": part, "label": torch.zeros(len(part))} for part in x.split(16)],
}


@pytest.mark.parametrize("kind", BATCHES)
@torch.no_grad()
def test_compensated(kind: str) -> None:
    """Steps, statistics and repair are those of transformers models; what is left is nn.ReLU."""
    net, x = Net().eval(), data()
    expected = net(x)
    swapped = Net().eval()
    hlg.convert(swapped)
    hlg.relu_ize(swapped, force=True)
    hlg.convert(net)
    batches = BATCHES[kind](x)
    measured = hlg.calibrate(net, batches).sites
    z = torch.cat([net.blocks[0].fc1(net.blocks[0].norm(part)) for part in x.split(16)])
    assert measured[0].std == pytest.approx(float(z.std(correction=0)), rel=1e-4)
    assert [site.rank for site in hlg.sensitivity(net, batches).sites]
    report = hlg.relu_ize(net, calibration=batches, compensate="least_squares")
    assert [type(block.act) for block in net.blocks] == [nn.ReLU] * 3
    left = (net(x) - expected).norm() / expected.norm()
    assert float(left) == pytest.approx(report.relative_change, rel=1e-4)
    assert left < 0.1 * (swapped(x) - expected).norm() / expected.norm()


def test_fold_gives_the_modules_back() -> None:
    net, x = Net().eval(), data()
    kept = [block.act for block in net.blocks]
    hlg.convert(net)
    for site in hlg.hardness_sites(net).values():
        site.set_hardness(9.0)
    expected = net(x)
    assert hlg.fold(net, x).difference < 1e-5
    assert [block.act for block in net.blocks] == kept
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    net = Net()
    hlg.convert(net)
    hlg.relu_ize(net, force=True)
    with pytest.raises(ValueError, match=r"transformers model.*got Net: .*safetensors\.torch\.save_model"):
        hlg.save_relu_pretrained(net, tmp_path / "net")
    with pytest.raises(hlg.CalibrationError, match=r"no tensor in it is an input of Net\.forward, which takes 'x'"):
        hlg.calibrate(converted(), [{"y": data()}])


def converted() -> Net:
    net = Net()
    hlg.convert(net)
    return net


@pytest.mark.parametrize("compensate", [None, "least_squares"])
def test_hard_coded_is_folded(compensate: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM stays BLOOM in stock transformers, and computes within 1e-5 of its pre-activations' scale what ReLU would."""
    model = bloom()
    batch = tiny.inputs(model)
    hlg.convert(model, hard_coded=True)
    tiny.set_hardness(model, 200.0)
    report = hlg.relu_ize(model, calibration=[batch], compensate=compensate)
    assert report.folded == {site.name: pytest.approx(0.17 / 2**14, rel=1e-3) for site in report.sites}
    assert not report.left
    assert str(report).startswith("0 activations are ReLU now")
    assert "2 that the model's class hard-codes stay smooth, at λ = 16384 in the weights: within 1e-05 of ReLU" in str(
        report
    )
    hlg.save_relu_pretrained(model, tmp_path / "bloom")
    stock = stock_outputs({"bloom": ("BloomForCausalLM", batch)}, tmp_path)["bloom"]
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) == 0.0
    for layer in model.transformer.h:
        monkeypatch.setattr(layer.mlp.gelu_impl, "forward", F.relu)
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) <= 1e-5


def test_hard_coded_in_the_dtypes_that_it_is_loaded_in(tmp_path: Path) -> None:
    """Its pre-activations are 2¹⁴ times as large as before: float16, which ends at 65504, is warned of where it is read."""
    model = bloom()
    tokens = torch.randint(3, 99, (8, 24), generator=torch.Generator().manual_seed(0))
    hlg.convert(model, hard_coded=True)
    report = hlg.relu_ize(model, force=True)
    folder = hlg.save_relu_pretrained(model, tmp_path / "bloom")
    finite = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = type(model).from_pretrained(folder, dtype=dtype)(tokens).logits
        finite[dtype] = bool(logits.isfinite().all())
    assert finite == {torch.float32: True, torch.bfloat16: True, torch.float16: False}
    assert "Load it in float32 or bfloat16" in str(report)
    assert "Load it in float32 or bfloat16" in (folder / "README.md").read_text()


def test_hard_coded_that_cannot_be_folded() -> None:
    """Half precision overflows at λ = 2¹⁴: refused, and λ and weights are as they were."""
    model = bloom().half()
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.mlp.dense_h_to_4h.weight.mul_(50.0)
    hlg.convert(model, hard_coded=True)
    tiny.set_hardness(model, 200.0)
    before = tiny.snapshot(model)
    with pytest.raises(hlg.FoldError, match="weights are too large for the dtype"):
        hlg.relu_ize(model, calibration=[tiny.inputs(model)])
    assert tiny.snapshot(model) == before


def test_quantised_weights() -> None:
    """Integers cannot be scaled or refit: told by the name of the weight; a mere substitution does not need them."""
    net = converted()
    codes = torch.zeros(5, 16, dtype=torch.int8)
    net.head.weight = nn.Parameter(codes, requires_grad=False)
    for act in (lambda: hlg.fold(net, data()), lambda: hlg.relu_ize(net, calibration=[data()], compensate="bias")):
        with pytest.raises(ValueError, match=r"head\.weight is quantised"):
            act()
    assert len(hlg.relu_ize(net, force=True).sites) == 3
