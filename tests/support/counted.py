"""What `calibrate` and the refit count of small models: tokens and padding, by site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hf_lambda_gelu as hlg

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGE: dict[str, Any] = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
Batch = dict[str, Tensor]


def ids(size: int, length: int) -> Tensor:
    return torch.randint(3, 99, (size, length), generator=torch.Generator().manual_seed(0))


def mask(size: int, length: int, padding: int, left: bool = False) -> Tensor:
    """The first example has so much padding."""
    made = torch.ones(size, length, dtype=torch.long)
    made[0, slice(0, padding) if left else slice(length - padding, length)] = 0
    return made


def pixels(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def counted(model: nn.Module, batch: Batch, **kwargs: Any) -> dict[str, tuple[int, int | None]]:
    """{site: (tokens, padding)}, of calibrate; and the refit must have seen the same."""
    hlg.convert(model.eval(), **kwargs)
    report = hlg.calibrate(model, [batch] * 2)
    seen = {site.name: (site.tokens // 2, None if site.padding is None else site.padding // 2) for site in report.sites}
    compensation = hlg.relu_ize(model, calibration=[batch] * 2, compensate="bias").compensation
    assert compensation is not None
    for site in compensation.sites:  # which leaves out what repeats itself
        tokens, padding = seen[site.name]
        assert (site.rows, site.padding) == (tokens, padding or 0), site
        assert ("padding counted too" in site.note) == (padding is None)
    return seen


def by_part(seen: dict[str, tuple[int, int | None]], depth: int = 1) -> dict[str, set[tuple[int, int | None]]]:
    found: dict[str, set[tuple[int, int | None]]] = {}
    for name, numbers in seen.items():
        found.setdefault(".".join(name.split(".")[:depth]), set()).add(numbers)
    return found
