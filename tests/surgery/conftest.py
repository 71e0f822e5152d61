"""Whatever a verb does, transformers' activation tables hold the same keys afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.activations import ACT2CLS, ACT2FN


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Whatever a test does, transformers' activation tables hold the same keys afterwards."""
    before = list(ACT2FN), list(ACT2CLS)
    yield
    assert (list(ACT2FN), list(ACT2CLS)) == before
