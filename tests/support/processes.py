"""Code in a Python process of its own, also one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch


def in_fresh_process(code: str, **environment: str) -> str:
    """What the code prints, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def killed(owner: Any, name: str, call: int, run: Callable[[], object]) -> None:
    """Run in a process of its own, which is killed at a call of a function."""
    pid = os.fork()
    if not pid:
        try:
            function, calls = getattr(owner, name), [0]

            def deadly(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            setattr(owner, name, deadly)
            torch.set_num_threads(1)
            run()
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
