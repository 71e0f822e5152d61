"""A folder for the time of a block, that stays neither after an error nor after a stop."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from .transaction import scratch_in_use

logger = logging.get_logger(__name__)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Within the block, an empty folder that the owner alone can read; afterwards it is gone.

    Where it cannot be removed, the work in the block is done all the same, so that is a warning, which names the folder.
    """
    folder = Path(tempfile.gettempdir(), f"hf_lambda_gelu-{secrets.token_hex(8)}")
    scratch_in_use(folder)  # before it is made, so that no stop comes in between
    try:
        folder.mkdir(mode=0o700)
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning(f"{str(folder)!r} cannot be removed ({error}): it holds calibration batches. Remove it by hand")
