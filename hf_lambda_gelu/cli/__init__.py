"""The command line `hf-lambda-gelu`: the package's verbs on folders and Hub names.

It may import every room, and no room imports it. Nothing here imports torch or transformers before a command runs: `--help`
and shell completion do without.
"""

from __future__ import annotations

from .app import app

NAME = "hf-lambda-gelu"


def main() -> None:
    """The entry point: runs the command that `sys.argv` names, and exits with its code."""
    app(prog_name=NAME)
