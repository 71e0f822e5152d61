"""A tiny text model and rows for it, as the scripts take them."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from transformers import BertTokenizer

from support import tiny

WORDS = ["film", "plot", "actor", "scene", "good", "great", "bad", "awful", "so", "so-so"]


NAMES = ["negative", "neutral", "positive"]


FIRST = {"negative": ["bad", "awful"], "neutral": ["so", "so-so"], "positive": ["good", "great"]}


def text_model(folder: Path) -> Path:
    """A tiny random BERT without dropout, with large weights, and a WordPiece tokenizer that knows `WORDS`."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    tiny.build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
    return folder


def text_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of `first`, `second` and `label`; the class hangs on the words of both texts."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        name = NAMES[index % 3]
        first, second = ([*generator.choices(WORDS[:4], k=generator.randint(2, 5)), w] for w in FIRST[name])
        rows.append({"first": " ".join(first), "second": " ".join(second), "label": name})
    generator.shuffle(rows)
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
