"""Offline, one thread a worker, real models from the cache that `make assets` fills."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_MODULES = tempfile.TemporaryDirectory(prefix="hf_modules-")  # code of checkpoints is copied there when it is loaded
os.environ["HF_MODULES_CACHE"] = _MODULES.name

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.tools.assets import available

torch.set_num_threads(1)  # two workers share two cores


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """`asset("minilm")` is the folder of a real model or data set; where it was not fetched, the test is skipped."""

    def find(name: str) -> Path:
        folder = available(name)
        if folder is None:
            message = f"{name} is not in the cache: run `make assets`"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        return folder

    return find
