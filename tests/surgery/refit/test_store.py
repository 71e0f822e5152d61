"""What the store keeps on disk comes back as it was."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hf_lambda_gelu.surgery.refit.store import Store


def test_store(tmp_path: Path) -> None:
    """Nested values come back as they were, also bf16, views and shared tensors, which are written once."""
    store = Store(tmp_path, torch.device("cpu"))
    big, strange = torch.randn(64, 64), torch.randn(6, 4).bfloat16().T
    value = {
        "x": [(big, big), strange],
        "n": None,
        "s": "text",
        "rows": big[1::2],
        "head": big[:3],
        "turned": big.T,
        "i": torch.tensor([1, 2]),
        "f": 2.5,
    }
    store.put("a", value)
    assert (tmp_path / "a.safetensors").stat().st_size < 2.7 * big.numel() * 4
    assert not any(isinstance(leaf, Tensor) for kept, _ in store._specs.values() for leaf in kept)
    got = store.get("a")
    assert torch.equal(got["x"][0][0], big)
    assert torch.equal(got["x"][0][1], big)
    assert got["x"][1].dtype == torch.bfloat16
    assert torch.equal(got["x"][1], strange)
    assert torch.equal(got["rows"], big[1::2])
    assert torch.equal(got["head"], big[:3])
    assert torch.equal(got["turned"], big.T)
    assert [got[name].stride() for name in ("turned", "head")] == [(1, 64), (64, 1)]
    assert (got["n"], got["s"], got["f"], got["i"].tolist()) == (None, "text", 2.5, [1, 2])
    store.put("b", big)
    store.rename("b", "a")
    assert "b" not in store
    assert torch.equal(store.get("a"), big)
    store.discard("a")
    store.discard("a")
    assert "a" not in store


def test_dimensions_keep_their_order_in_memory(tmp_path: Path) -> None:
    """Images with channels last, a transposed hidden state, and what is expanded: it has a row of its own then."""
    store = Store(tmp_path, torch.device("cpu"))
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    hidden = torch.randn(2, 8, 6).transpose(1, 2)
    store.put("a", [image, hidden, torch.ones(1, 4).expand(3, 4), torch.tensor(2.0)])
    got = store.get("a")
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got[0], image)
    assert got[1].stride() == hidden.stride()
    assert torch.equal(got[1], hidden)
    assert torch.equal(got[2], torch.ones(3, 4))
    assert got[3].shape == ()
