"""How every command works: results to stdout, all else to stderr, an error in one line, an exit code for scripts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from types import FrameType
from typing import Any

import typer

FAILED, USE, INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """The command was used wrongly: exit code 2. The message says what was got and what to do."""


class WorkFailed(Exception):
    """The command was right and its work failed: exit code 1. The message says what happened and what to do."""


@dataclass
class Result:
    """What a command will print, once it has succeeded.

    Attributes:
        value: for `--json`, an object.
        text: for people; by default the value's own.
        code: 1 where the answer is no.
        silent: whether another process prints it.
    """

    value: Any = None
    text: str = ""
    code: int = 0
    silent: bool = False

    def set(self, value: Any, text: str | None = None, code: int = 0) -> None:
        self.value, self.text, self.code = value, str(value) if text is None else text, code


@contextlib.contextmanager
def working(as_json: bool, debug: bool) -> Iterator[Result]:
    """Around the body of a command: it sets the `Result`, which goes to stdout at the end; errors become exit codes.

    Whatever the body prints goes to stderr. Without a terminal there are no progress bars.

    Raises:
        typer.Exit: with the code, where it is not 0.
    """
    result = Result()
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        signal.default_int_handler(number, frame)

    try:
        with contextlib.redirect_stdout(sys.stderr), _on_interrupt(stop):
            _set_bars()
            yield result
        text = json.dumps(to_dict(result.value), ensure_ascii=False, allow_nan=False) if as_json else result.text
        if not result.silent:
            print(text, flush=True)
    except typer.Exit:
        raise
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # or the interpreter complains when it flushes at its end
        raise typer.Exit(FAILED) from None
    except BaseException as error:
        if debug:
            traceback.print_exc()
        # a library may turn the stop that reached it into an error of its own, as torch does where it reads an argument
        code, message = explained(KeyboardInterrupt() if stopped and isinstance(error, Exception) else error)
        if code is None:
            raise
        print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr)
        raise typer.Exit(code) from None
    if result.code:
        raise typer.Exit(result.code)


@contextlib.contextmanager
def _on_interrupt(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C goes to `handler` within the block, where it would have raised KeyboardInterrupt."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def explained(error: BaseException) -> tuple[int | None, str]:
    """The exit code of an error and its message in one line; None for what is no error, such as SystemExit."""
    import hf_lambda_gelu as hlg

    message = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted: nothing was left half done"
    if (
        isinstance(error, (UsageError, hlg.ConversionError, hlg.CalibrationError, hlg.HingeError))
        or type(error) is ValueError
    ):
        return USE, message  # the package says by ValueError that an argument is wrong
    failures = (hlg.CheckpointError, hlg.ExportError, hlg.FoldError, hlg.PushError, hlg.SoftGateError, hlg.VerificationError)
    if isinstance(error, (WorkFailed, *failures)):
        return FAILED, message
    if isinstance(error, Exception):
        return FAILED, f"{type(error).__name__}: {message or 'no message'}. --debug shows where"
    return None, message


def to_dict(value: Any) -> Any:
    """Any report as what JSON can hold: mappings, lists, strings, numbers; None for a number that is not finite."""
    if hasattr(value, "to_dict"):
        return to_dict(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_dict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _set_bars() -> None:
    """No bars where nobody sees them; the libraries' own switches, which the package's verbs follow too."""
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bars()
