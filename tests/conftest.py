"""Offline, one thread a worker, real models from the cache that `make assets` fills."""

from __future__ import annotations

import gc
import os
import tempfile

gc.disable()  # until all is imported and collected: there is no garbage among it, and looking for some took 8 s a worker
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; of the processes that tests start, too
os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed says on stderr that it chose it
_MODULES = tempfile.TemporaryDirectory(prefix="hf_modules-")  # code of checkpoints is copied there when it is loaded
os.environ["HF_MODULES_CACHE"] = _MODULES.name

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from support.hub_server import HubServer
from support.publishing import TOKEN
from transformers.utils import logging

from hf_lambda_gelu.checkpoints import stock_process
from scripts.tools.assets import available
from scripts.tools.warm_stock import run_in_stock

LONGEST = {"test_notebooks", "test_docs", "test_two_processes", "test_readme", "test_engines"}
_RUN_APART = stock_process.run_apart


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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What was imported by its end stays for good: the garbage collector leaves it out, for a seventh of the time."""
    try:
        return (yield)
    finally:
        gc.enable()
        gc.set_threshold(20_000, 20)  # young garbage waits for more of its kind
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is at work on one of them when the other has ended."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_sessionfinish() -> None:
    """At the interpreter's end all is garbage."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` are skipped where there is no such device."""
    if "cuda" in item.keywords and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two workers share two cores, and tensors of these sizes are slower on two threads."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def progress_bars_as_before() -> Iterator[None]:
    """transformers' switch is one for the process; the command line, which some tests call in it, sets it for good."""
    shown = logging.is_progress_bar_enabled()
    yield
    switch = logging.enable_progress_bar if shown else logging.disable_progress_bar
    switch()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session", autouse=True)
def proofs_in_forks() -> Iterator[None]:
    """Proofs run in forks of one process that has imported stock transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_process, "run_apart", run_in_stock)
        yield


@pytest.fixture(autouse=True)
def own_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for tests marked `own_process`, which start them as the package does."""
    if "own_process" in request.keywords:
        monkeypatch.setattr(stock_process, "run_apart", _RUN_APART)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server with nothing on it; the client in this process may go online, to loopback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer(token=TOKEN) as server:
        # cards are validated against the endpoint that was read at import
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server
