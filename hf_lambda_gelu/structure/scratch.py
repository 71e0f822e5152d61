"""A folder for the time of a block, that stays neither after an error nor after a stop, nor long after a kill."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from .claims import Claim, clear_left
from .transaction import if_it_fails

logger = logging.get_logger(__name__)

_NAME = "hf_lambda_gelu-scratch-"


@contextmanager
def scratch_folder(kept_on: tuple[type[BaseException], ...] = ()) -> Iterator[Path]:
    """Within the block, an empty folder that the owner alone can read; afterwards it is gone.

    Where it cannot be removed, the work in the block is done all the same, so that is a warning, which names the folder.
    What a killed process left is removed first.

    Args:
        kept_on: errors on which it is kept, as they name it.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        clear_left(left)
    claim = Claim(Path(tempfile.gettempdir(), _NAME + secrets.token_hex(8)))
    if_it_fails(claim.remove)  # before it is made, so that no stop comes in between
    try:
        claim.take()
        yield claim.folder
    except kept_on:
        claim.leave(keep=True)
        raise
    except BaseException:
        claim.remove()
        raise
    try:
        shutil.rmtree(claim.folder)
    except OSError as error:
        logger.warning(f"{str(claim.folder)!r} cannot be removed ({error}): it holds calibration batches. Remove it by hand")
    claim.leave()
