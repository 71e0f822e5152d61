"""What the tests of `sparsify_ffn` share."""

from __future__ import annotations

import pytest
from support.sparse_calls import Calls

from hf_lambda_gelu.downstream import sparse_ffn, sparse_products
from hf_lambda_gelu.downstream.crossover import Crossover


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernel pays always: for models as tiny as these it would never."""
    monkeypatch.setattr(sparse_ffn, "crossover", lambda dense, sparse: Crossover(2.0, 1.0, 1.0))
    found = Calls()
    for name in ("gathered", "chosen"):
        monkeypatch.setattr(sparse_products, name, found.counted(name, getattr(sparse_products, name)))
    return found
