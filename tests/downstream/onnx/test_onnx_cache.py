"""Decoders step by step: onnxruntime generates what transformers does, from files of one step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from support import tiny
from support.cli import files
from support.models import converted

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream.onnx import cache


def opened(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def empty(report: hlg.ExportReport, count: int) -> dict[str, np.ndarray]:
    """The keys and values before the first token."""
    shapes = {name: shape for name, shape in report.inputs.items() if name.startswith("past_key_values.")}
    return {name: np.zeros((count, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}  # type: ignore[arg-type]


def generated(
    report: hlg.ExportReport, tokens: np.ndarray, mask: np.ndarray | None = None, **others: np.ndarray
) -> Iterator[Any]:
    """The next token's logits, for ever: the first step takes all tokens, the others the one that was chosen."""
    ready, past = opened(report.path), empty(report, len(tokens))
    while True:
        feed = {"decoder_input_ids" if mask is None else "input_ids": tokens, **others, **past}
        logits, *present = ready.run(None, feed if mask is None else {**feed, "attention_mask": mask})
        yield logits[:, -1]
        tokens, past = logits[:, -1:].argmax(-1), dict(zip(past, present, strict=True))
        mask = None if mask is None else np.concatenate([mask, np.ones_like(tokens)], axis=1)


@pytest.mark.parametrize(("name", "layers"), [("gpt2", "n_layer"), ("llama", "num_hidden_layers")])
def test_a_decoder(name: str, layers: str, tmp_path: Path) -> None:
    """λ-GELU in two layers, two texts, one padded on the left: the tokens of `generate`, its scores within rounding."""
    model = converted(name, 3.0, 0.5, **{layers: 2})
    before = tiny.snapshot(model)
    report = hlg.export_onnx(model, tmp_path / "m.onnx", cache=True)
    assert tiny.snapshot(model) == before
    assert list(report.inputs)[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert list(report.outputs)[:2] == ["logits", "present.0.key"]
    assert len(report.folded) == 2
    assert [shapes["input_ids"] for shapes in report.checked] == [(2, 4), (1, 8), (1, 1)]
    assert [shapes["past_key_values.0.key"][2] for shapes in report.checked] == [4, 0, 7]

    tokens = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    wanted = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for got, expected in zip(generated(report, tokens.numpy(), mask.numpy()), wanted.logits, strict=False):
        assert np.abs(got - expected.numpy()).max() <= 2e-5 * float(expected.abs().max())


def test_an_encoder_and_its_decoder(tmp_path: Path) -> None:
    """Whisper with λ-GELU: the decoder's file takes what the encoder's returns; against whole passes of transformers."""
    model = converted("whisper", 3.0, encoder_layers=1, decoder_layers=1)
    first = hlg.export_onnx(model, tmp_path / "encoder.onnx", encoder=True, cache=True)
    second = hlg.export_onnx(model, tmp_path / "decoder.onnx", cache=True)
    assert list(first.outputs) == ["last_hidden_state", "cross.0.key", "cross.0.value"]
    assert [name for name in second.inputs if not name.startswith("past")] == ["decoder_input_ids", *list(first.outputs)[1:]]
    assert first.operators["Gelu"] == 3
    assert second.operators["Gelu"] == 1
    sounds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    hidden, *cross = opened(first.path).run(None, {"input_features": sounds.numpy()})
    with torch.no_grad():
        assert np.abs(hidden - model.model.encoder(sounds)[0].numpy()).max() <= 2e-5 * np.abs(hidden).max()
    tokens = torch.tensor([[1, 9, 4], [1, 7, 5]])
    steps = generated(second, tokens.numpy(), **dict(zip(list(first.outputs)[1:], cross, strict=True)))
    for _ in range(5):
        with torch.no_grad():
            expected = model(sounds, decoder_input_ids=tokens).logits[:, -1]
        assert np.abs(next(steps) - expected.numpy()).max() <= 2e-5 * float(expected.abs().max())
        tokens = torch.cat([tokens, expected.argmax(-1, keepdim=True)], dim=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", {}, "BertForMaskedLM keeps no keys and values .*leave cache=True out"),
        ("vit", {}, "takes input_ids and attention_mask alone, got pixel_values"),
        ("gpt2", {"encoder": True}, "has no encoder beside a decoder"),
        ("gpt2", {"dynamic": {}}, "with cache=True the names of the sizes are given"),
    ],
)
def test_refused(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hlg.export_onnx(tiny.build(name), tmp_path / "m.onnx", cache=True, **options)
    assert files(tmp_path) == []


def test_a_cache_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are compared with a whole pass, not with themselves."""
    right = cache._cache
    monkeypatch.setattr(cache, "_cache", lambda prefix, inputs: right(prefix, {k: v * 0.9 for k, v in inputs.items()}))
    with pytest.raises(hlg.ExportError, match=r"computes something else with a cache \(5 tokens, then 3\) than at once"):
        hlg.export_onnx(tiny.build("gpt2"), tmp_path / "m.onnx", cache=True)
    assert files(tmp_path) == []
