"""The hidden state among a block's arguments."""

from __future__ import annotations

import pytest
import torch

from hf_lambda_gelu.surgery.refit.blocks import with_hidden, without_hidden


def test_hidden_as_keyword() -> None:
    """The hidden state is the first floating point tensor, by position or by name; without one it is said."""
    x, mask = torch.ones(2, 3), torch.ones(2, dtype=torch.long)
    rest, hidden = without_hidden(((mask, None), {"flag": True, "x": x, "y": x}))
    assert hidden is x
    args, kwargs = with_hidden(rest, x * 2)
    assert args == (mask, None)
    assert torch.equal(kwargs["x"], x * 2)
    assert kwargs["y"] is x
    assert kwargs["flag"] is True
    with pytest.raises(ValueError, match="no hidden state"):
        without_hidden(((mask,), {}))
