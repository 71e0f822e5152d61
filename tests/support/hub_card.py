"""What the Hub says about the metadata of a model card."""

from __future__ import annotations

import re
from typing import Any

import yaml

RESULT = {"task": {"type": str}, "dataset": {"type": str, "name": str}, "metrics": [{"type": str, "value": object}]}
CARD: dict[str, Any] = dict.fromkeys(("license", "library_name", "pipeline_tag"), str)
CARD |= {key: [str] for key in ("tags", "language", "datasets", "metrics", "base_model")}
CARD["model-index"] = [{"name": str, "results": [RESULT]}]


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata: the gross mistakes that the Hub rejects, far from all of them."""
    match = re.match(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", content.replace("\r\n", "\n"), re.DOTALL | re.MULTILINE)
    if not match or not match[1].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(card, dict):
        return ["the metadata must be a mapping"], []
    for key in {"language", "datasets", "metrics", "base_model"} & card.keys():  # one or several
        card[key] = [card[key]] if isinstance(card[key], str) else card[key]
    return [text for key in card if key in CARD for text in _misfits(card[key], CARD[key], key)], []


def _misfits(value: Any, shape: Any, name: str) -> list[str]:
    """Where `value` departs from `shape`: a type, [shape of every item] or {key: shape}."""
    if value is None:
        return [f'"{name}" is required']
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, kind) or value == "":
        return [f'"{name}" must be {({str: "a string", list: "an array", dict: "an object"}).get(kind, "given")}']
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, list):
        parts = [(item, shape[0], f"{name}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        parts = [(value.get(key), shape[key], f"{name}.{key}") for key in shape]
    return [text for part in parts for text in _misfits(*part)]
