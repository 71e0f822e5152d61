"""The worker threads of gloo, of which Python does not know: one that is left at a process's end may abort it."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

WORKERS = 2 if sys.platform == "linux" else 0  # of a process group; elsewhere threads cannot be seen by their names


def gloo_workers() -> int:
    """How many there are in this process."""
    count = 0
    for thread in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            count += thread.read_text().startswith("pt_gloo_run")
    return count


def check_none_is_left() -> None:
    """RuntimeError if one is. Linux may list a thread for a moment after it was joined, so there are ten seconds."""
    until = time.monotonic() + 10
    while left := gloo_workers():
        if time.monotonic() > until:
            raise RuntimeError(f"{left} of gloo's worker threads go on, so something still refers to the process group")
        time.sleep(0.01)
