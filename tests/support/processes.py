"""Code in a Python process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def in_fresh_process(code: str, **environment: str) -> str:
    """What the code prints, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
