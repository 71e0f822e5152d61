"""The tasks of the study that start from random weights: an MLP, two CNNs, a ViT and a GPT-2, small, on real data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput

from scripts.studies.tasks import Task
from scripts.tools.assets import asset


@dataclass(frozen=True)
class ScratchTask(Task):
    """A small network from random weights.

    Attributes:
        rows: makes all rows, by split, as the model takes them.
        build: makes the network.
    """

    rows: Callable[[], datasets.DatasetDict]
    build: Callable[[], PreTrainedModel]

    pretrained = False

    def raw(self) -> datasets.DatasetDict:
        return self.rows()

    def model(self) -> PreTrainedModel:
        return self.build()


@dataclass(frozen=True)
class LanguageTask(ScratchTask):
    """A language model, judged by the bytes that it foretells."""

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        def compute(prediction: EvalPrediction) -> dict[str, float]:
            guesses = prediction.predictions[:, :-1].argmax(-1)
            return {"accuracy": float((guesses == prediction.label_ids[:, 1:]).mean())}

        return compute


# --------------------------------------------------------------------------------------------------------------- networks


class MLPConfig(PreTrainedConfig):
    model_type = "study_mlp"

    def __init__(
        self,
        features: int = 18,
        hidden_size: int = 64,
        num_hidden_layers: int = 4,
        hidden_act: str = "gelu",
        **kwargs: Any,
    ) -> None:
        self.features, self.hidden_size, self.num_hidden_layers = features, hidden_size, num_hidden_layers
        self.hidden_act = hidden_act
        super().__init__(**kwargs)


class MLPForClassification(PreTrainedModel):
    """Linear, activation, as many times as there are layers, and a linear head."""

    config_class = MLPConfig
    main_input_name = "features"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        sizes = [config.features] + [config.hidden_size] * config.num_hidden_layers
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activations = nn.ModuleList(ACT2FN[config.hidden_act] for _ in self.linears)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, features: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> SequenceClassifierOutput:
        for linear, activation in zip(self.linears, self.activations, strict=True):
            features = activation(linear(features))
        logits = self.head(features)
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def _vit() -> PreTrainedModel:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def _resnet() -> PreTrainedModel:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[2, 2, 2],
        layer_type="basic",
        hidden_act="gelu",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


def _convnext() -> PreTrainedModel:
    config = ConvNextConfig(
        num_channels=1, patch_size=2, hidden_sizes=[24, 48, 96], depths=[2, 2, 2], num_stages=3, num_labels=10
    )
    return ConvNextForImageClassification(config)


def _mobilenet() -> PreTrainedModel:
    """With SiLU: depthwise 3 × 3 convolutions follow half of the activations, a batch norm every convolution.

    By default transformers drops 0.8 of the features where TensorFlow keeps as many, and its running statistics are those
    of the last batch, as the momentum is TensorFlow's too, which torch reads the other way round.
    """
    config = MobileNetV2Config(
        num_channels=1,
        image_size=28,
        depth_multiplier=0.35,
        output_stride=8,
        hidden_act="silu",
        tf_padding=False,
        classifier_dropout_prob=0.2,
        num_labels=10,
    )
    model = MobileNetV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=96,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


# -------------------------------------------------------------------------------------------------------------------- data


def _dataset(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns).with_format("torch")


@functools.cache
def _segment() -> datasets.DatasetDict:
    """Regions of outdoor pictures by 18 numbers, each scaled by the training split."""
    raw = datasets.load_dataset(str(asset("segment")))
    names = [name for name in raw["train"].column_names if name != "label"]
    values = {split: np.stack([rows[name] for name in names], 1).astype(np.float32) for split, rows in raw.items()}
    mean, std = values["train"].mean(0), values["train"].std(0) + 1e-6
    return datasets.DatasetDict(
        {split: _dataset(features=(values[split] - mean) / std, labels=rows["label"]) for split, rows in raw.items()}
    )


@functools.cache
def _digits() -> datasets.DatasetDict:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = (digits.images[order, None] / 8.0 - 1.0).astype(np.float32)
    parts = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
    return datasets.DatasetDict(
        {name: _dataset(pixel_values=pixels[part], labels=digits.target[order][part]) for name, part in parts.items()}
    )


@functools.cache
def _fashion() -> datasets.DatasetDict:
    raw = datasets.load_dataset(str(asset("fashion_mnist")))

    def rows(split: str, start: int, stop: int) -> datasets.Dataset:
        chosen = raw[split].select(range(start, stop))
        pixels = np.stack([np.asarray(image, np.float32) for image in chosen["image"]])[:, None]
        return _dataset(pixel_values=pixels / 127.5 - 1.0, labels=chosen["label"])

    return datasets.DatasetDict(
        train=rows("train", 0, 6000), validation=rows("train", 6000, 7000), test=rows("test", 0, 1000)
    )


@functools.cache
def _editorials() -> datasets.DatasetDict:
    """Windows of 64 bytes."""
    raw = datasets.load_dataset(str(asset("editorials")))

    def rows(split: str) -> datasets.Dataset:
        text = np.frombuffer("\n".join(raw[split]["text"]).encode("utf-8"), np.uint8).astype(np.int64)
        windows = text[: len(text) // 64 * 64].reshape(-1, 64)
        return _dataset(input_ids=windows, labels=windows)

    return datasets.DatasetDict({split: rows(split) for split in raw})


SCRATCH = (
    ScratchTask(
        "segment",
        "MLP, image segments",
        1500,
        500,
        10,
        (3e-3, 1e-3),
        _segment,
        lambda: MLPForClassification(MLPConfig(num_labels=7)),
    ),
    ScratchTask("digits", "ViT, digits", 1000, 497, 15, (1e-3, 3e-3), _digits, _vit),
    ScratchTask("resnet", "ResNet, Fashion-MNIST", 4000, 1000, 4, (3e-3, 1e-3), _fashion, _resnet),
    ScratchTask("convnext", "ConvNeXt, Fashion-MNIST", 4000, 1000, 4, (3e-3, 1e-3), _fashion, _convnext),
    ScratchTask("mobilenet", "MobileNetV2, Fashion-MNIST", 4000, 1000, 4, (3e-3, 1e-3), _fashion, _mobilenet),
    LanguageTask("bytes", "GPT-2, bytes of editorials", 2400, 500, 4, (3e-3, 1e-3), _editorials, _gpt2),
)
