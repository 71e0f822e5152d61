"""`export_onnx`: onnxruntime, called here by itself on sizes that the export never saw, computes what transformers does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support import tiny
from support.models import converted
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, PreTrainedModel, WhisperForConditionalGeneration

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.onnx import export
from hf_lambda_gelu.downstream.onnx.inputs import dynamic_axes

CLOSE = 2e-5  # max |onnxruntime − torch| relative to the largest output


def operators(path: Path) -> Counter[str]:
    """By onnx itself: the network's graph alone, in which nothing hides."""
    model = onnx.load(path)
    assert not model.functions
    return Counter(node.op_type for node in model.graph.node)


def compared(path: Path, model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """max |onnxruntime − torch| / max |torch| of the first output."""
    ready = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {item.name for item in ready.get_inputs()} == set(batch)
    got = torch.from_numpy(ready.run(None, {name: value.numpy() for name, value in batch.items()})[0])
    with torch.no_grad():
        expected = model(**batch)[0]
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def text(*shape: int, padded: bool = True) -> dict[str, Tensor]:
    """Tokens, and a mask with padding at the end of the first example."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, shape[1] // 2 :] = 0 if padded else 1
    return {"input_ids": ids, "attention_mask": mask}


def images(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


def test_lambda_gelu_becomes_gelu(tmp_path: Path) -> None:
    """λ = 3 and 3.5: the file has Gelu alone and computes the λ-GELU model, which stays as it was, in training mode too."""
    model = converted("bert", 3.0, 0.5, num_hidden_layers=1)
    model.train()
    model.bert.encoder.eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, attributes = tiny.snapshot(model), {name: set(vars(part)) for name, part in model.named_modules()}
    grads = [parameter.grad for parameter in model.parameters()]
    report = hlg.export_onnx(model, tmp_path / "made" / "bert.onnx")

    assert tiny.snapshot(model) == before
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    assert all(now.grad is then for now, then in zip(model.parameters(), grads, strict=True))
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["bert.onnx"]
    assert report.path == tmp_path / "made" / "bert.onnx"
    assert operators(report.path) == report.operators
    assert report.operators["Gelu"] == 2
    assert "Erf" not in report.operators
    assert list(report.folded.values()) == pytest.approx([3.0, 3.5])
    assert report.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert report.outputs == {"logits": ("batch", "sequence", 99)}
    assert [shapes["input_ids"] for shapes in report.checked] == [(2, 8), (1, 4)]
    assert report.difference <= CLOSE
    assert compared(report.path, model.eval(), text(5, 13)) <= CLOSE
    soft = BertForMaskedLM(model.config).eval()  # the same function but for λ = 1
    soft.load_state_dict(model.state_dict())
    tiny.set_hardness(soft, 1.0)
    assert compared(report.path, soft, text(5, 13)) > 100 * CLOSE, "λ matters here"


@pytest.mark.parametrize(
    ("name", "batches", "activation"),
    [
        ("vit", [images(3, 3, 32, 32)], None),
        ("dinov2", [images(3, 3, 24, 48), images(1, 3, 40, 16)], "Gelu"),
        ("gpt2", [text(3, 17), text(1, 1, padded=False)], "Tanh"),
        ("llama", [text(3, 17), text(1, 1, padded=False)], None),
    ],
)
def test_networks(name: str, batches: list[dict[str, Tensor]], activation: str | None, tmp_path: Path) -> None:
    """In sizes of which neither the trace nor the check had any, one token included; as a ReLU network where None."""
    layers = {"n_layer" if name == "gpt2" else "num_hidden_layers": 1}
    model = tiny.build(name, **layers, **({} if activation else tiny.relu_overrides(name)))
    report = hlg.export_onnx(model, tmp_path / f"{name}.onnx")
    for batch in batches:
        assert compared(report.path, model, batch) <= CLOSE
    found = operators(report.path)
    if activation:
        assert found[activation] == 1
    else:
        assert found["Relu"] == 1
        assert not found.keys() & {"Gelu", "Erf", "Tanh", "Sigmoid"}
    assert report.folded == {}
    assert ("llama.cpp" in str(report)) == (name in ("llama", "gpt2", "bert") and not activation)


def test_encoder(tmp_path: Path) -> None:
    """Whisper's encoder with λ-GELU, as a part of the whole model, from a folder in bf16 of which float32 is made."""
    model = converted("whisper", 3.0)
    with torch.no_grad():
        model.to(torch.bfloat16).save_pretrained(tmp_path / "whisper")
    report = hlg.export_onnx(tmp_path / "whisper", tmp_path / "encoder.onnx", encoder=True)
    assert list(report.inputs) == ["input_features"]
    assert list(report.outputs) == ["last_hidden_state"]
    assert len(report.folded) == 2
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "whisper", dtype=torch.float32).eval()
    batch = {"input_features": torch.randn(5, 8, 32, generator=torch.Generator().manual_seed(1))}
    assert compared(report.path, again.model.encoder, batch) <= CLOSE
    assert operators(report.path)["Gelu"] == 4


def test_images_that_must_keep_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Swin's must: a file that fails with others is made again with the size fixed, and the report says so."""
    model = tiny.build("convnext", depths=[1], hidden_sizes=[16], num_stages=1)
    real = export.compared

    def failing(ready: Any, network: nn.Module, batch: Mapping[str, Tensor]) -> float:
        if batch["pixel_values"].shape[2:] != (32, 32):
            raise hlg.ExportError("onnxruntime fails on inputs of another size")
        return real(ready, network, batch)

    monkeypatch.setattr(export, "compared", failing)
    report = hlg.export_onnx(model, tmp_path / "made.onnx")
    assert report.inputs == {"pixel_values": ("batch", 3, 32, 32)}
    assert report.warnings == (
        "images must be of 32 × 32: with others the file would fail or compute something else than torch",
    )
    assert compared(report.path, model, images(5, 3, 32, 32)) <= CLOSE
    assert [path.name for path in tmp_path.iterdir()] == ["made.onnx"]


def test_sounds_and_their_mask_have_one_length() -> None:
    model = tiny.build("wav2vec2", feat_extract_norm="layer")
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    assert dynamic_axes(model, batch) == {name: {0: "batch", 1: "samples"} for name in batch}


class Mixer(nn.Module):
    """No model of transformers: two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.act(self.first(x))
        return self.second(hidden) * scale, x + scale


def test_plain_modules(tmp_path: Path) -> None:
    """Inputs by position; the dimensions that the caller names, and no others, may change."""
    torch.manual_seed(0)
    model = Mixer()
    hlg.convert(model, init_hardness=2.0)
    given = (torch.randn(5, 4), torch.tensor([2.0]))
    report = hlg.export_onnx(model, tmp_path / "m.onnx", given, dynamic={"x": {0: "rows"}})
    assert report.inputs == {"x": ("rows", 4), "scale": (1,)}
    assert report.outputs == {"output_0": ("rows", 3), "output_1": ("rows", 4)}
    assert report.folded == {"act": 2.0}
    assert compared(report.path, model, {"x": torch.randn(7, 4), "scale": torch.tensor([-1.0])}) <= CLOSE
    fixed = hlg.export_onnx(model, tmp_path / "fixed.onnx", given, dynamic={})
    assert fixed.inputs["x"] == (5, 4)
    assert len(fixed.checked) == 1


def test_large_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A protobuf file holds 2 GiB; what is over lies in a file that is found after both were moved."""
    monkeypatch.setattr("hf_lambda_gelu.downstream.onnx.tracing.IN_ONE_FILE", 1000)
    model = tiny.build("vit", num_hidden_layers=1)
    report = hlg.export_onnx(model, tmp_path / "vit.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.onnx", "vit.onnx.data"]
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert compared(report.path, model, images(3, 3, 32, 32)) <= CLOSE


def test_report(tmp_path: Path) -> None:
    """As text and as JSON."""
    report = hlg.export_onnx(converted("vit", 2.0, num_hidden_layers=1), tmp_path / "v.onnx")
    found: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert found["path"] == str(tmp_path / "v.onnx")
    assert found["inputs"] == {"pixel_values": ["batch", 3, 32, 32]}
    assert found["checked"] == [{"pixel_values": [2, 3, 32, 32]}, {"pixel_values": [1, 3, 32, 32]}]
    shown = str(report)
    assert "opset 20" in shown
    assert "of these 1 Gelu" in shown
    assert "pixel_values: batch × 3 × 32 × 32" in shown
    assert "λ folded into the weights at 1 sites: vit.layers.0.mlp.activation_fn" in shown.replace("encoder.layer", "layers")
    assert onnx.load(report.path).opset_import[0].version == 20 == report.opset


def test_a_real_model_on_real_texts(asset: Any, tmp_path: Path) -> None:
    """MiniLM with λ-GELU: the sentences of the check are the caller's; others, longer ones, come out alike."""
    folder = asset("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert isinstance(model, PreTrainedModel)
    hlg.convert(model, init_hardness=3.0)
    given = tokenizer(["a quiet film", "two hours that felt like four"], padding=True, return_tensors="pt")
    report = hlg.export_onnx(model, tmp_path / "minilm.onnx", given)
    assert list(report.inputs) == list(given)
    assert report.operators["Gelu"] == 6
    longer = tokenizer(["it stays with you for a long time, that is all I can say", "no"], padding=True, return_tensors="pt")
    assert compared(report.path, model, dict(longer)) <= CLOSE
