"""Code in a process of its own: of a fresh interpreter, or forked from one that has imported stock transformers alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.tools.warm_stock import run_in_stock

ROOT = Path(__file__).resolve().parents[2]
PLACES = [str(ROOT), str(ROOT / "tests")]  # of the package, the scripts and `support`


def in_fresh_process(code: str, **environment: str) -> str:
    """What the code prints, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def module_in_fresh_process(module: str, *arguments: str) -> str:
    """As `python -m module arguments…` on one thread, with `support` to import; what it says on stderr."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*PLACES, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def in_fork(
    code: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `python -c code arguments…`, where neither the import nor what else happens before the code is the matter.

    It imports this package, the scripts and `support` anew; transformers is there, which saves seconds.
    """
    settings = os.environ if env is None else env
    return run_in_stock(textwrap.dedent(code), arguments, str(cwd or Path.cwd()), settings, PLACES)


def module_in_fork(
    module: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `python -m module arguments…`."""
    code = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return in_fork(code, *arguments, cwd=cwd, env=env)


def in_child(run: Callable[[], object]) -> None:
    """Run in a process of its own that is forked from this one: for what leaves threads, which no later fork survives."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            torch.set_num_threads(1)
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "see what it has printed"


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
