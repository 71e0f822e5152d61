"""The token of the Hub on loopback, and code that uses what was published there without this package."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from hf_lambda_gelu.checkpoints.manifest import manifest
from hf_lambda_gelu.checkpoints.verify import Proof
from scripts.tools.warm_stock import run_in_stock
from support.hub_server import HubServer

TOKEN = "hf_test"


def not_proven(model: PreTrainedModel, folder: Path, inputs: object = None, trust_remote_code: bool = False) -> Proof:
    """In the place of `prove`, which takes seconds, where the comparison is not what a test is about."""
    return Proof(0.0, manifest(folder, trust_remote_code))


def hub_with_a_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A Hub from which this process downloads into a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def run_stock(hub: HubServer, home: Path, code: str, *arguments: str) -> str:
    """Run code in a process that cannot import the package, with the server as its Hub."""
    program = "import sys; sys.modules['hf_lambda_gelu'] = None\n" + textwrap.dedent(code)
    process = run_in_stock(program, arguments, str(Path.cwd()), hub.env(home))
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.strip()
