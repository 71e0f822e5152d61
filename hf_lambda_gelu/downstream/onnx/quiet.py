"""Exporters and quantisers print and log what no user can do anything about."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_LOGS = ("torch.onnx", "onnxscript", "onnx_ir", "")  # the last is the root, by which onnxruntime's quantiser logs


@contextmanager
def quietly() -> Iterator[None]:
    """Without logs and warnings, which tell of packages that nobody needs, and the graphs that torch prints on failures."""
    levels = {name: logging.getLogger(name).level for name in _LOGS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
