"""Inputs for a model that came without any: forward takes them, and every verb that makes do with them works."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertTokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    PreTrainedModel,
    SegformerConfig,
    SegformerForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViltConfig,
    ViltModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.audit.audit import audit
from hf_lambda_gelu.measurement.examples.choice import example_inputs

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
IMAGES = {"image_size": 32, "patch_size": 16}


def segformer() -> PreTrainedModel:
    stages = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return SegformerForImageClassification(SegformerConfig(**stages))


def canine() -> PreTrainedModel:
    return CanineForSequenceClassification(CanineConfig(**SIZES, local_transformer_stride=8, upsampling_kernel_size=4))


def spectrogram() -> PreTrainedModel:
    return ASTForAudioClassification(ASTConfig(**SIZES, max_length=64, num_mel_bins=32))


def video() -> PreTrainedModel:
    return VideoMAEForVideoClassification(VideoMAEConfig(**SIZES, **IMAGES, num_frames=4))


def image_and_text() -> PreTrainedModel:
    return ViltModel(ViltConfig(**SIZES, **IMAGES, vocab_size=99))


def image_to_text() -> PreTrainedModel:
    decoder = BertConfig(**SIZES, vocab_size=99, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**SIZES, **IMAGES), decoder)
    return VisionEncoderDecoderModel(config=config)


# name → (how it is made, the shapes of what forward must be given)
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, tuple[int, ...]]]] = {
    "segformer": (segformer, {"pixel_values": (2, 3, 64, 64)}),
    "canine": (canine, {"input_ids": (2, 12)}),
    "spectrogram": (spectrogram, {"input_values": (2, 64, 32)}),
    "video": (video, {"pixel_values": (2, 4, 3, 32, 32)}),
    "image and text": (image_and_text, {"input_ids": (2, 12), "pixel_values": (2, 3, 32, 32)}),
    "image to text": (image_to_text, {"pixel_values": (2, 3, 32, 32), "decoder_input_ids": (2, 8)}),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_new_architectures(name: str) -> None:
    """The right shapes; `audit` and `fold` make do with them, and reach every site."""
    model = build(name)
    batch = example_inputs(model)
    shapes = MODELS[name][1]
    assert {k: tuple(v.shape) for k, v in batch.items() if k in shapes} == shapes
    again = example_inputs(model)
    assert all(torch.equal(batch[k], again[k]) for k in batch)

    hlg.convert(model)
    sites = hlg.hardness_sites(model)
    assert sites
    ran = {entry.name for entry in audit(model).entries if entry.kind == "lambda_gelu"}
    assert ran == set(sites)
    for site in sites.values():
        site.set_hardness(2.0)
    torch.manual_seed(0)  # ViLT draws an order of its patches
    with torch.no_grad():
        before = model(**batch)[0]
    report = hlg.fold(model)
    assert set(report.sites) == set(sites)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["segformer", "image and text", "image to text"])
def test_verified_without_inputs(name: str, tmp_path: Path) -> None:
    model = build(name)
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    hlg.save_relu_pretrained(model, tmp_path / "relu")
    assert hlg.verify_relu_pretrained(model, tmp_path / "relu") == 0.0


def drawn(*shape: int, low: int = 0, high: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) if high is None else torch.randint(low, high, shape, generator=generator)


def test_plain_architectures_keep_their_batches() -> None:
    """Saved checks were made with these numbers."""
    for name, expected in {
        "bert": {"input_ids": drawn(2, 8, high=99)},
        "vit": {"pixel_values": drawn(2, 3, 32, 32)},
        "wav2vec2": {"input_values": drawn(1, 4000)},
    }.items():
        batch = example_inputs(tiny.build(name))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[k], expected[k]) for k in expected), name
    batch = example_inputs(tiny.build("t5"))
    assert torch.equal(batch["input_ids"], drawn(2, 8, high=99))
    assert batch["decoder_input_ids"].shape == (2, 4)


class Odd:
    """A processor that does not bear being called."""

    def __call__(self, *_: object, **__: object) -> object:
        raise OSError("a library is missing")


def test_inputs_of_a_processor() -> None:
    """What the model's own tokenizer and image processor make; where forward does not take it, as without."""
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "one"])}
    tokenizer = BertTokenizer(vocab=words)
    model = tiny.build("bert")
    batch, plain = example_inputs(model, tokenizer), example_inputs(model)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"][0, :4].tolist() == [2, 5, 6, 1]  # "A small example"
    assert not batch["attention_mask"].all()  # padding, which the plain ones lack
    assert torch.equal(example_inputs(model, Odd())["input_ids"], plain["input_ids"])
    model = tiny.build("t5")
    assert example_inputs(model, tokenizer)["decoder_input_ids"].shape == (2, 4)
    pair = [tokenizer, ViTImageProcessor(size={"height": 32, "width": 32})]
    shapes = {name: tuple(value.shape) for name, value in example_inputs(tiny.build("clip"), pair).items()}
    assert shapes.items() >= {("pixel_values", (2, 3, 32, 32))}
    assert shapes["input_ids"] == shapes["attention_mask"]
    small = BertTokenizer(vocab={**words, **{f"w{i}": i for i in range(8, 200)}, "example": 200})
    assert example_inputs(tiny.build("bert"), small)["input_ids"].max() < 99  # its 200 is beyond the embedding


def test_half_precision() -> None:
    model = build("video").to(torch.bfloat16)
    assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16


def test_leaves_no_trace() -> None:
    """Modes and all random states are as they were, though dropout is on and one attempt fails."""
    model = build("segformer").train()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    example_inputs(model)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
    assert all(module.training for module in model.modules())


def test_refused() -> None:
    """The error says what both attempts met, and what to do."""
    model = tiny.build("bert")
    model.forward = lambda input_ids: torch.zeros(2) @ torch.zeros(3)
    message = r"no inputs can be guessed for BertForMaskedLM: RuntimeError: .*size.*; then .*Pass inputs="
    with pytest.raises(ValueError, match=message):
        example_inputs(model)
