"""llm-compressor on MiniLM: what rounding or pruning the weights costs the three networks, on the same reviews."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import hf_lambda_gelu as hlg

from ..tools.assets import asset
from .networks import sentence_networks
from .rows import Row

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or llm-compressor warns
CALIBRATION, PROBE, TEST, LENGTH = 96, 600, 500, 48  # reviews; tokens of each at most
HEADS = ["re:.*pooler.*"]


def recipes() -> dict[str, Callable[[], Any]]:
    """Name → what makes the modifier, which is used up by one run."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    return {
        "GPTQ, 4-bit weights": lambda: GPTQModifier(targets=["Linear"], scheme="W4A16", ignore=HEADS),
        "GPTQ, 8-bit weights and inputs": lambda: GPTQModifier(targets=["Linear"], scheme="W8A8", ignore=HEADS),
        # a list: of a name alone it takes the letters, and prunes nothing
        "SparseGPT, 2 of 4 weights 0": lambda: SparseGPTModifier(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=HEADS
        ),
    }


def compression() -> Iterator[Row]:
    """Accuracy of a probe on the embeddings, before and after, and the cosine between these embeddings."""
    smooth, hardened, relu, _ = sentence_networks()
    folded = copy.deepcopy(hardened)
    hlg.fold(folded)  # a stock network, as llm-compressor writes stock configs
    networks = [smooth, folded, relu]
    for network in networks:
        assert isinstance(network, PreTrainedModel)
    before = [embeddings(network, reviews().test[0]) for network in networks]
    for name, recipe in recipes().items():
        cells = []
        for network, dense in zip(networks, before, strict=True):
            found = embeddings(compressed(network, recipe()), reviews().test[0])  # type: ignore[arg-type]
            cosine = float((found * dense).sum(1).mean())
            cells.append(f"{accuracy(dense):.1%} → {accuracy(found):.1%}, cosine {cosine:.3f}")
        yield Row("llm-compressor", f"MiniLM, {name}: accuracy of a probe on {TEST} reviews", *cells)


def compressed(network: PreTrainedModel, modifier: Any) -> PreTrainedModel:
    """What stock transformers loads of a folder with the compressed weights; RuntimeError if it lost its activation."""
    from llmcompressor import oneshot
    from loguru import logger

    logger.disable("llmcompressor")
    texts = reviews()
    rows = [texts.tokens(text) for text in texts.calibration]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "dense"), Path(folder, "compressed")
        network.save_pretrained(source)
        model = AutoModel.from_pretrained(source)
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=modifier,
            processor=texts.tokenizer,
            max_seq_length=LENGTH,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,  # the same order each time, or roundings differ
        )
        if network.config.hidden_act == "relu":
            hlg.save_relu_pretrained(model, target)
        else:
            model.save_pretrained(target)
        found: PreTrainedModel = AutoModel.from_pretrained(target)
    if found.config.hidden_act != network.config.hidden_act:
        raise RuntimeError(f"the config says {found.config.hidden_act}, the network's {network.config.hidden_act}")
    return found


def accuracy(found: Tensor) -> float:
    """Of the probe, which was fitted to the smooth network's embeddings and knows no other."""
    return float((torch.tensor(probe().predict(found.numpy())) == torch.tensor(reviews().test[1])).float().mean())


@cache
def probe() -> Any:
    """Logistic regression on the smooth network's embeddings."""
    from sklearn.linear_model import LogisticRegression

    texts, labels = reviews().probe
    return LogisticRegression(C=10.0, max_iter=2000).fit(embeddings(sentence_networks().smooth, texts).numpy(), labels)


@torch.no_grad()
def embeddings(network: nn.Module, texts: list[str]) -> Tensor:
    """The mean of the last hidden states over a text's tokens, of length 1, as MiniLM was trained."""
    tokenizer, found = reviews().tokenizer, {}
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 16):
        chosen = order[start : start + 16]
        batch = tokenizer(
            [texts[index] for index in chosen], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        states, mask = network(**batch).last_hidden_state, batch["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        found.update(zip(chosen, mean / mean.norm(dim=1, keepdim=True), strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


class Reviews(NamedTuple):
    """Texts with their labels; those of the refit and of llm-compressor's calibration have no part in the test."""

    tokenizer: Any
    calibration: list[str]
    probe: tuple[list[str], list[int]]
    test: tuple[list[str], list[int]]

    def tokens(self, text: str) -> dict[str, list[int]]:
        return dict(self.tokenizer(text, truncation=True, max_length=LENGTH))


@cache
def reviews() -> Reviews:
    """From the film reviews: the first of the shuffled training texts calibrate, as in `sentence_networks`."""
    data = load_dataset(str(asset("movie_reviews")))
    train, test = data["train"].shuffle(seed=0), data["test"].shuffle(seed=0).select(range(TEST))
    chosen = train.select(range(CALIBRATION, CALIBRATION + PROBE))
    return Reviews(
        AutoTokenizer.from_pretrained(asset("minilm")),
        list(train.select(range(CALIBRATION))["text"]),
        (list(chosen["text"]), list(chosen["label"])),
        (list(test["text"]), list(test["label"])),
    )
