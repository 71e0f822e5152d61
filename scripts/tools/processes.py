"""A script in a process of its own, from whatever folder: relative paths that it is given stay relative to that folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def run_module(module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments…` to its end; options are those of `subprocess.run`, text and check aside."""
    env = dict(options.pop("env", os.environ))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-m", module, *arguments], env=env, text=True, check=False, **options)
