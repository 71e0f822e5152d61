"""`export_onnx(int8=…)`: the file rounds as the formula says, and onnxruntime runs its products in integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from support import tiny
from support.cli import files
from support.models import converted
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import hf_lambda_gelu as hlg


def session(path: Path, optimised: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def texts(count: int = 3, length: int = 9) -> list[dict[str, Tensor]]:
    """Batches of random tokens, the first example padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (count, 4, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0, length // 2 :] = 0
    return [{"input_ids": one, "attention_mask": other} for one, other in zip(ids, mask, strict=True)]


def mlp(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), activation, nn.Linear(32, 4)).eval()


def rounded(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """To the nearest of 256 numbers, equally spaced from `low` to `high`, 0 among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def weights_rounded(weight: Tensor) -> np.ndarray:
    """Each row to the nearest of 255 numbers around 0."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return ((weight / scale).round() * scale).numpy()


def test_it_rounds_as_the_formula_says(tmp_path: Path) -> None:
    """Against numpy: inputs and what ReLU puts out to 8 bits in the range of the batches, weights by row, sums exact."""
    model, batches = mlp(nn.ReLU()), list(torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(1)))
    report = hlg.export_onnx(model, tmp_path / "mlp.onnx", int8=batches)
    seen = torch.cat(batches)
    with torch.no_grad():
        hidden = model[:2](seen)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).numpy()
    first = rounded(x, float(seen.min()), float(seen.max())) @ weights_rounded(model[0].weight.detach()).T
    second = rounded(np.maximum(first + model[0].bias.detach().numpy(), 0), 0.0, float(hidden.max()))
    expected = second @ weights_rounded(model[2].weight.detach()).T + model[2].bias.detach().numpy()
    (got,) = session(report.path).run(None, {"input": x})
    step = float(hidden.max()) / 255 * float(model[2].weight.detach().abs().max())  # where a tie falls the other way
    assert np.quantile(np.abs(got - expected), 0.9) <= 1e-5
    assert np.abs(got - expected).max() <= 2 * step
    with torch.no_grad():
        exact = model(torch.from_numpy(x)).numpy()
    assert np.abs(got - exact).mean() > step / 10, "rounding shows"


@pytest.mark.parametrize(
    ("name", "options", "island"),
    [
        ("bert", {"num_hidden_layers": 1}, None),
        ("gpt2", {"n_layer": 1, "activation_function": "relu"}, None),
        ("llama", {"num_hidden_layers": 1, "hidden_act": "relu"}, "Max+Mul"),
    ],
)
def test_islands(name: str, options: dict[str, Any], island: str | None, tmp_path: Path) -> None:
    """None in a block with ReLU; of a gate its product. Every linear map is of integers, and there is no Relu any more."""
    options = {**tiny.relu_overrides(name), **options}
    model, batches = tiny.build(name, **options), texts()
    before = tiny.snapshot(model)
    report = hlg.export_onnx(model, tmp_path / "m.onnx", int8=batches)
    assert tiny.snapshot(model) == before
    assert files(tmp_path) == ["m.onnx"]
    found = report.int8
    assert found is not None
    assert found.islands == ({} if island is None else {island: 1})
    import onnx

    session(report.path, tmp_path / "run.onnx")
    ran = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert ran.count("QGemm") == found.products[0] == found.products[1] >= 5
    assert "Relu" not in ran
    assert 1e-4 < found.difference < 0.1
    assert report.inputs["input_ids"] == ("batch", "sequence")
    longer = texts(1, 15)[0]  # than any that was seen
    got = session(report.path).run(None, {key: value.numpy() for key, value in longer.items()})[0]
    with torch.no_grad():
        expected = model(**longer)[0]
    assert float((torch.from_numpy(got) - expected).norm() / expected.norm()) < 0.15


def test_the_report(tmp_path: Path) -> None:
    """λ-GELU is folded first; the change is measured anew here, padding left out; sizes are the files'."""
    model, batches = converted("bert", 3.0, num_hidden_layers=1), texts()
    plain = hlg.export_onnx(model, tmp_path / "float.onnx", batches[0])
    report = hlg.export_onnx(model, tmp_path / "int8.onnx", int8=iter(batches))
    assert list(report.folded.values()) == pytest.approx([3.0] * 2)
    assert report.size == (tmp_path / "int8.onnx").stat().st_size
    found = report.int8
    assert found is not None
    assert found.float_size == plain.size
    first, second = (
        [session(path).run(None, {k: v.numpy() for k, v in batch.items()})[0] for batch in batches]
        for path in (plain.path, report.path)
    )
    kept = [batch["attention_mask"].bool().numpy() for batch in batches]
    moved = sum(((a - b)[mask] ** 2).sum() for a, b, mask in zip(first, second, kept, strict=True))
    assert found.difference == pytest.approx(
        float(moved / sum((a[m] ** 2).sum() for a, m in zip(first, kept, strict=True))) ** 0.5, rel=1e-3
    )
    shown = str(report)
    assert "8-bit integers in 8 of 8 linear maps, ranges from 3 batches" in shown
    assert "in float between one and the next: 1 Gelu" in shown
    assert json.loads(json.dumps(report.to_dict()))["int8"]["islands"] == {"Gelu": 1}


def test_large_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lambda_gelu.downstream.onnx.tracing.IN_ONE_FILE", 1000)
    monkeypatch.setattr("hf_lambda_gelu.downstream.onnx.int8.IN_ONE_FILE", 1000)
    model = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4)).eval()
    report = hlg.export_onnx(model, tmp_path / "m.onnx", int8=[torch.randn(4, 8)])
    assert files(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert session(report.path).run(None, {"input": np.zeros((7, 8), np.float32)})[0].shape == (7, 4)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "the calibration set yielded no batch"),
        ([{"words": torch.ones(2, 3)}], {}, "calibration batch 0 holds 'words': no tensor in it is an input of Bert"),
        (texts(1), {"cache": True}, "exported in float alone: leave cache=True or int8=… out"),
    ],
)
def test_refused(batches: list[Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Nothing is left, and the model is as it was."""
    model = tiny.build("bert", num_hidden_layers=1)
    before = tiny.snapshot(model)
    with pytest.raises((ValueError, hlg.ExportError), match=message):
        hlg.export_onnx(model, tmp_path / "new" / "m.onnx", int8=batches, **options)
    assert tiny.snapshot(model) == before
    assert files(tmp_path) == []


class Scaled(nn.Module):
    """Two inputs, one of them tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        made: Tensor = self.linear(self.embed(ids)) * scale
        return made


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"ids": torch.ones(2, 3, dtype=torch.long)},
            "calibration batch 1 has no 'scale', which the file takes: it has ids",
        ),
        (
            {"ids": torch.ones(2, 4, dtype=torch.long), "scale": torch.ones(2, 1, 1)},
            "calibration batch 1: ids is 2 × 4, the file takes batch × 3. Give batches of that size",
        ),
        (
            {"ids": torch.full((2, 3), 10), "scale": torch.ones(2, 1, 1)},
            "onnxruntime fails on the float file with calibration batch 1 of .*out of data bounds",
        ),
    ],
)
def test_batches_that_do_not_fit(second: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    first = {"ids": torch.ones(2, 3, dtype=torch.long), "scale": torch.ones(2, 1, 1)}
    with pytest.raises((ValueError, hlg.ExportError), match=message):
        hlg.export_onnx(Scaled(), tmp_path / "m.onnx", int8=[first, second])
    assert files(tmp_path) == []


def test_too_few_bits(tmp_path: Path) -> None:
    """One input 10,000 times as large as the others, of which alone the output is made: they round to 0."""
    model, batch = mlp(nn.ReLU()), torch.randn(32, 8)
    batch[:, 0] *= 1e4
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
    report = hlg.export_onnx(model, tmp_path / "m.onnx", int8=[batch])
    assert report.int8 is not None
    assert report.int8.difference > 0.25
    assert "8-bit integers change the main output by" in report.warnings[0]
    assert report.warnings[0] in str(report)


def test_nothing_to_quantise(tmp_path: Path) -> None:
    with pytest.raises(hlg.ExportError, match="no linear map with a weight of its own: there is nothing to quantise"):
        hlg.export_onnx(nn.ReLU(), tmp_path / "m.onnx", int8=[torch.randn(2, 3)])
    assert files(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("a tensor without a range")])
def test_a_stop_while_quantising(stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", stopped)
    expected = KeyboardInterrupt if stop is KeyboardInterrupt else hlg.ExportError
    with pytest.raises(
        expected, match="" if stop is KeyboardInterrupt else "does not quantise the network: a tensor without"
    ):
        hlg.export_onnx(mlp(nn.ReLU()), tmp_path / "m.onnx", int8=[torch.randn(2, 8)])
    assert files(tmp_path) == []


def test_a_real_model_on_real_texts(asset: Any, tmp_path: Path) -> None:
    """The first layers of MiniLM: their activations in float, the sentences' meaning kept."""
    folder = asset("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, num_hidden_layers=2)
    sentences = ["a quiet film", "two hours that felt like four", "it stays with you for a long time", "no"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    report = hlg.export_onnx(model, tmp_path / "minilm.onnx", int8=[batch])
    assert report.int8 is not None
    assert report.int8.islands == {"Gelu": 2}
    assert report.int8.products == (13, 13)
    assert report.size < report.int8.float_size - 0.7 * 4 * 2 * 12 * 384**2  # of a layer's weights three bytes of four go
    other = tokenizer(["a film that is quiet", "it was far too long"], padding=True, return_tensors="pt")
    (got, *_) = session(report.path).run(None, {key: value.numpy() for key, value in other.items()})
    with torch.no_grad():
        expected = model(**other)[0]
    kept = other["attention_mask"][..., None]
    pooled = [(value * kept).sum(1) for value in (torch.from_numpy(got), expected)]
    assert float(torch.cosine_similarity(*pooled).min()) > 0.98
