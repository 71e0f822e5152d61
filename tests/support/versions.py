"""Tests of what the oldest versions do otherwise, which is theirs and not ours; Python 3.10 gets some of these."""

from __future__ import annotations

import huggingface_hub
import pytest
import transformers
from packaging.version import Version

_TRANSFORMERS = Version(transformers.__version__)
OLDER_TRANSFORMERS = Version("5.23") > _TRANSFORMERS


def newer_transformers(reason: str) -> pytest.MarkDecorator:
    """Skips a test where transformers is older than 5.23, in which `reason` is not yet so."""
    return pytest.mark.skipif(OLDER_TRANSFORMERS, reason=f"transformers {_TRANSFORMERS}: {reason}")


newer_hub = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.0"),
    reason="older clients check cards at the public Hub, whatever their endpoint is",
)
