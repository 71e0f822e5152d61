"""Stops every verb at every call of a Python function, one at a time, and looks whether anything was left changed.

    python -m scripts.tools.injection                        # every verb on three tiny models; rows already there are kept
    python -m scripts.tools.injection --verbs fold --every 50 --lines

At each call (with --lines at each line of the package too) the process forks. In the child the call raises
KeyboardInterrupt, MemoryError or OSError, in turn. What that left of the model and the process is compared with what was
before the verb (`fingerprint`). The parent goes on unharmed. Where a library takes such an error for an answer,
the verb goes on and raises nothing: that is counted as absorbed. Results go to --out, a CSV file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dis
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .fingerprint import fingerprint
from .injection_cases import MODELS, VERBS, Verb
from .tables import append, read

RESULTS = Path(__file__).parent / "results" / "injection.csv"
FIELDS = ["verb", "model", "every", "points", "tried", "raised", "absorbed", "changed", "seconds", "first"]
_ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, MemoryError, OSError)
_RESUME = dis.opmap["RESUME"]
_SAME, _ABSORBED, _CHANGED, _BROKEN = 0, 10, 11, 12
# Forking costs most of a stop. Fewer and larger pages halve that; so does a fork without the handlers of libraries,
# which reset threads that this process does not have.
_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONMALLOC": "malloc"}
_fork: Callable[[], int] = getattr(ctypes.PyDLL(None), "_Fork", os.fork)


def _begins(frame: FrameType) -> bool:
    """Whether a function begins; a generator that goes on is no call."""
    code = frame.f_code.co_code
    return frame.f_lasti < 0 or code[frame.f_lasti] != _RESUME or code[frame.f_lasti + 1] == 0


class Injection:
    """One verb on one model, stopped at every `every`-th point from `offset` on.

    Attributes:
        points, tried: how many points there were, and at how many the verb was stopped.
        raised, absorbed, changed: what became of those.
        first: where a stop left something changed for the first time, and what.
    """

    def __init__(self, verb: Verb, model: nn.Module, every: int = 1, offset: int = 0, lines: bool = False) -> None:
        self.verb, self.model, self.every, self.offset, self.lines = verb, model, every, offset, lines
        self.points = self.tried = self.raised = self.absorbed = self.changed = 0
        self.first = ""
        self.folder = Path(tempfile.mkdtemp(prefix="injection-"))
        self.temporary, self._kept = self.folder / "tmp", self.folder / "kept"
        self._pid = os.getpid()
        self._pipe = os.pipe()

    def run(self) -> Injection:
        """Run the verb once, with all its stops; RuntimeError if it fails by itself."""
        for folder in (self.temporary, self._kept):
            folder.mkdir()
        before, tempfile.tempdir = tempfile.tempdir, str(self.temporary)
        try:
            self.verb.begin(self.model, self.temporary)
            self.before = fingerprint(self.model, self.temporary)
            gc.collect()
            gc.freeze()  # a collection in a child would write to, and so copy, all memory
            outcome = _ABSORBED
            try:
                sys.settrace(self._trace)
                try:
                    self.verb.run(self.model, self.temporary)
                finally:
                    sys.settrace(None)
            except BaseException:
                if os.getpid() == self._pid:
                    raise
                outcome = _SAME
            if os.getpid() != self._pid:
                self._report(outcome)
        finally:
            if os.getpid() == self._pid:
                tempfile.tempdir = before
                shutil.rmtree(self.folder, ignore_errors=True)
        return self

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        own = self.lines and f"{os.sep}hf_lambda_gelu{os.sep}" in name
        if name.endswith(("injection.py", "injection_cases.py")):
            return None
        if (event == "call" and _begins(frame)) or (event == "line" and own):
            self.points += 1
            if self.points % self.every == self.offset % self.every:
                self._stop(frame)
        return self._trace if own else None

    def _stop(self, frame: FrameType) -> None:
        """Fork: the child raises here, the parent waits for what came of it."""
        self.tried += 1
        self._keep_files()
        numbers = random.getstate()
        child = _fork()
        if child == 0:
            random.setstate(numbers)  # Python seeds anew in a forked process
            raise _ERRORS[self.tried % 3]("injected")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self._put_files_back()
        if status == _ABSORBED:
            self.absorbed += 1
            return
        self.raised += 1
        if status != _SAME:
            self.changed += 1
            text = os.read(self._pipe[0], 4096).decode() if status == _CHANGED else f"the process ended with {status}"
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name} ({self.points})"
            self.first = self.first or f"{where}: {text}"
            if os.environ.get("INJECTION_VERBOSE"):
                print(f"{where}: {text}", flush=True)

    def _report(self, outcome: int) -> None:
        """In the child: compare, and end the process."""
        try:
            if outcome == _ABSORBED:
                os._exit(_ABSORBED)
            changes = self._changes()
            if changes:
                gc.collect()  # generators that a stop left in their block end with their traceback
                changes = self._changes()
            if changes:
                os.write(self._pipe[1], "; ".join(changes)[:2000].encode())
            os._exit(_CHANGED if changes else _SAME)
        except BaseException:
            os._exit(_BROKEN)

    def _changes(self) -> list[str]:
        now = fingerprint(self.model, self.temporary)
        changes = [f"{k}" for k in (now.keys() | self.before.keys()) if now.get(k) != self.before.get(k)]
        there = set(self.before["temporary files"]) <= set(now["temporary files"])
        if "temporary files" in changes and there and self.verb.whole(self.temporary):
            changes.remove("temporary files")
        return sorted(changes)

    # The child removes the files that the parent still needs: they are kept under a second name meanwhile.

    def _keep_files(self) -> None:
        self._files = []
        for index, path in enumerate(sorted(self.temporary.rglob("*"))):
            is_dir = path.is_dir()
            self._files.append((path, is_dir, path.stat().st_ino))
            if not is_dir:
                os.link(path, self._kept / str(index))

    def _put_files_back(self) -> None:
        wanted = {path for path, _, _ in self._files}
        for path in sorted(self.temporary.rglob("*"), reverse=True):
            if path not in wanted:
                path.rmdir() if path.is_dir() else path.unlink()
        for index, (path, is_dir, inode) in enumerate(self._files):
            if is_dir:
                path.mkdir(exist_ok=True)
                continue
            kept = self._kept / str(index)
            if not path.exists() or path.stat().st_ino != inode:
                path.unlink(missing_ok=True)
                os.link(kept, path)
            kept.unlink()


def inject(verb: str, model: str, **options: Any) -> Injection:
    """Run the verb on the model once, so that all is imported and cached, then with its stops on one made anew."""
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder, "tmp")
        warm.mkdir()
        made = VERBS[verb].prepare(MODELS[model]())
        VERBS[verb].begin(made, warm)
        VERBS[verb].run(made, warm)
    return Injection(VERBS[verb], VERBS[verb].prepare(MODELS[model]()), **options).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--every", type=int, default=1, help="stop at every n-th point alone")
    parser.add_argument("--offset", type=int, default=0, help="from this one on")
    parser.add_argument("--lines", action="store_true", help="stop at every line of the package too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not _MEMORY.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "scripts.tools.injection", *sys.argv[1:]], {**os.environ, **_MEMORY}
        )
    torch.set_num_threads(1)  # a forked process has no other threads
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    changed = 0
    for verb in options.verbs:
        for model in options.models:
            if model in VERBS[verb].skips:
                continue
            row = next((r for r in read(options.out) if (r["verb"], r["model"]) == (verb, model)), None)
            if row is None:
                start = time.monotonic()
                found = inject(verb, model, every=options.every, offset=options.offset, lines=options.lines)
                row = {field: getattr(found, field, "") for field in FIELDS}
                row |= {"verb": verb, "model": model, "every": options.every, "seconds": round(time.monotonic() - start)}
                append(options.out, FIELDS, [row])
            changed += int(row["changed"])
            text = f"{verb:26} {model:8} {row['changed']} changed of {row['raised']} ({row['absorbed']} absorbed, "
            print(text + f"{row['tried']} of {row['points']} points) {row['first']}", flush=True)
    return int(changed > 0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
