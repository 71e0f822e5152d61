"""Kills everything that writes folders or files, at random moments, and looks whether anything was lost or is half.

    python -m scripts.tools.writers                                # all of it; about ten minutes of one core
    python -m scripts.tools.writers --writers convert_checkpoint --kills 10 --out runs/writers.csv

A writer runs in a forked process, so that a try costs no import. After a SIGKILL at a random moment, the target must be what
it was before or what an undisturbed run makes, file by file; the next run must succeed, and leave nothing else, in the
target's folder or among scratch folders. Further rows: two processes with one target at once; a full disk (a limit on the
size of files, and where this user may mount one, a small file system); a folder that another user may not write into.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import write_record

from .tables import append, read

RESULTS = Path(__file__).parent / "results" / "writers.csv"
FIELDS = ["writer", "disturbed by", "tries", "as before", "complete", "refused", "half", "left", "seconds"]
_NOBODY = 65534
_PARTIAL = ".hf_lambda_gelu-partial"  # ends the names of what is being written
_DONE, _REFUSED, _OTHER = 0, 3, 4
Write = Callable[[Path], object]


@dataclass(frozen=True)
class Writer:
    """One of them.

    Attributes:
        write: makes the target.
        old: what is made there before; else None.
        replaces: whether it may run again.
    """

    write: Write
    old: Write | None = None
    replaces: bool = True


@dataclass
class Tally:
    """What became of the tries."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS[2:-1], 0))

    def add(self, **found: int) -> None:
        for name, count in found.items():
            self.counts[name.replace("_", " ")] += count


def writers(source: Path) -> dict[str, Writer]:
    """All of them, on a checkpoint of a few shards and its models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    smooth = LlamaForCausalLM(config)
    smooth.save_pretrained(source / "smooth", max_shard_size="20KB")
    hard = LlamaForCausalLM(config)
    hlg.convert(hard, init_hardness=500.0)
    hard.save_pretrained(source / "hard", max_shard_size="20KB")
    relu = LlamaForCausalLM(config)
    hlg.convert(relu)
    report = hlg.relu_ize(relu, force=True)

    def save(target: Path) -> None:
        hlg.save_relu_pretrained(relu, target, report=report, overwrite=True)

    def with_code(target: Path, overwrite: bool) -> None:
        hlg.save_with_code(hard, target, overwrite=overwrite)

    def disk(verb: Any, folder: str, **options: Any) -> Writer:
        return Writer(lambda target: verb(source / folder, target, **options), replaces=False)

    example = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    hlg.export_onnx(relu, source / "model.onnx", example)  # imports what another user may not read
    return {
        "save_relu_pretrained": Writer(save),
        "save_relu_pretrained, overwrite": Writer(save, old=smooth.save_pretrained),
        "convert_checkpoint": disk(hlg.convert_checkpoint, "smooth"),
        "convert_checkpoint, copies": disk(hlg.convert_checkpoint, "smooth", link=False),
        "relu_ize_checkpoint": disk(hlg.relu_ize_checkpoint, "hard", force=True),
        "save_with_code": Writer(lambda target: with_code(target, False), replaces=False),
        "save_with_code, overwrite": Writer(lambda target: with_code(target, True), old=smooth.save_pretrained),
        "export_onnx": Writer(lambda target: hlg.export_onnx(relu, target / "model.onnx", example), replaces=False),
        "the record of a card": Writer(lambda target: write_record(target, {"checks": ["one"] * 99}), old=save),
    }


def started(write: Write, target: Path, before: Callable[[], object] = lambda: None) -> int:
    """The process that writes, forked; it ends with 0, or 3 for an error that says what is wrong."""
    child = os.fork()
    if child:
        return child
    code = _OTHER
    try:
        before()
        write(target)
        code = _DONE
    except (ValueError, OSError, RuntimeError, SafetensorError):
        code = _REFUSED
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str] | None:
    """Path in a folder → digest; None where there is no folder, or an empty one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _PARTIAL not in str(path))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files} or None


class Try:
    """A folder of its own with a target in it, as it is before a writer runs."""

    def __init__(self, writer: Writer, place: Path) -> None:
        self.writer, self.place = writer, place
        self.target, self.scratch = place / "target", place / "scratch"
        self.scratch.mkdir()
        tempfile.tempdir = str(self.scratch)
        if writer.old is not None:
            writer.old(self.target)
        self.before = contents(self.target)

    def judge(self, whole: dict[str, str], tally: Tally) -> None:
        """Count what the target is now; then write once more, undisturbed, and count what is left."""
        found = contents(self.target)
        kind = {"as_before": found == self.before, "complete": found == whole}
        tally.add(tries=1, **kind, half=not any(kind.values()))
        code = ended(started(self.writer.write, self.target))
        again = _DONE if self.writer.replaces or found != whole else _REFUSED
        left = [*self.scratch.iterdir(), *self.place.rglob(f"*{_PARTIAL}"), *self.place.glob(".*")]
        tally.add(left=len({*left}), half=code != again or contents(self.target) != whole)


def killed(writer: Writer, kills: int, root: Path, whole: dict[str, str], seconds: float, rng: random.Random) -> Tally:
    """SIGKILLs at moments that are spread over a run, and a little beyond."""
    tally = Tally()
    for i in range(kills):
        attempt = Try(writer, _folder(root, f"kill{i}"))
        child = started(writer.write, attempt.target)
        end = time.perf_counter() + rng.uniform(0.0, 1.05 * seconds)
        while time.perf_counter() < end and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        ended(child)
        attempt.judge(whole, tally)
    return tally


def together(writer: Writer, tries: int, root: Path, whole: dict[str, str]) -> Tally:
    """Two processes with one target: one makes it, the other is refused, unless it came after and replaces it."""
    tally = Tally()
    for i in range(tries):
        attempt = Try(writer, _folder(root, f"both{i}"))
        codes = [ended(child) for child in [started(writer.write, attempt.target) for _ in range(2)]]
        tally.add(refused=codes.count(_REFUSED), half=_DONE not in codes or not {*codes} <= {_DONE, _REFUSED})
        attempt.judge(whole, tally)
    return tally


def full_disk(writer: Writer, tries: int, root: Path, whole: dict[str, str], rng: random.Random) -> Tally:
    """Files may not grow beyond a random size, as on a disk that has room for no more."""
    tally = Tally()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    for i in range(tries):
        attempt, size = Try(writer, _folder(root, f"full{i}")), rng.randrange(20_000)
        tally.add(refused=ended(started(writer.write, attempt.target, limited)) == _REFUSED)
        attempt.judge(whole, tally)
    return tally


def small_disk(writer: Writer, tries: int, root: Path, whole: dict[str, str], rng: random.Random) -> Tally | None:
    """A file system in memory with random room, which is given more for the last run; None where it may not be mounted."""
    tally = Tally()
    for i in range(tries):
        place = _folder(root, f"small{i}")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
            return None
        try:
            attempt = Try(writer, place)
            room = os.statvfs(place)
            taken = (room.f_blocks - room.f_bfree) * room.f_bsize + rng.randrange(0, 120_000, 4096)
            subprocess.run(["mount", "-o", f"remount,size={taken}", str(place)], check=True)
            tally.add(refused=ended(started(writer.write, attempt.target)) == _REFUSED)
            subprocess.run(["mount", "-o", "remount,size=2m", str(place)], check=True)
            attempt.judge(whole, tally)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    return tally


def no_permission(writer: Writer, root: Path, whole: dict[str, str]) -> Tally:
    """The folder belongs to another user."""
    tally, attempt = Tally(), Try(writer, _folder(root, "locked"))

    def as_nobody() -> None:
        if os.geteuid() == 0:
            attempt.scratch.chmod(0o777)
            os.setegid(_NOBODY)
            os.seteuid(_NOBODY)
        else:
            attempt.place.chmod(0o555)

    tally.add(refused=ended(started(writer.write, attempt.target, as_nobody)) == _REFUSED)
    attempt.place.chmod(0o755)
    attempt.judge(whole, tally)
    return tally


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(mode=0o755)
    return folder


def run(name: str, writer: Writer, kills: int, root: Path, results: Path) -> None:
    """The rows of one writer that are not there yet."""
    known = {(row["writer"], row["disturbed by"]) for row in read(results)}
    attempt = Try(writer, _folder(root, "whole"))
    start = time.perf_counter()
    if ended(started(writer.write, attempt.target)) != _DONE:
        sys.exit(f"{name} fails undisturbed")
    seconds, whole = time.perf_counter() - start, contents(attempt.target)
    if whole is None:
        sys.exit(f"{name} writes nothing")
    rng = random.Random(name)
    few = max(1, kills // 5)
    ways: dict[str, Callable[[], Tally | None]] = {
        "SIGKILL": lambda: killed(writer, kills, root, whole, seconds, rng),
        "another at once": lambda: together(writer, few, root, whole),
        "a limit on files": lambda: full_disk(writer, few, root, whole, rng),
        "a full disk": lambda: small_disk(writer, few, root, whole, rng),
        "another's folder": lambda: no_permission(writer, root, whole),
    }
    for way, disturb in ways.items():
        if (name, way) not in known:
            start = time.perf_counter()
            tally = disturb()
            if tally is not None:
                row = {"writer": name, "disturbed by": way, **tally.counts, "seconds": f"{time.perf_counter() - start:.0f}"}
                append(results, FIELDS, [row])
                print(row, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tools.writers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--writers", nargs="+", help="by default all")
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs a writer; a fifth as many of the other disturbances")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "source")
        made.mkdir()
        Path(folder).chmod(0o755)
        found = writers(made)
        for index, name in enumerate(arguments.writers or found):
            run(name, found[name], arguments.kills, _folder(Path(folder), f"writer{index}"), arguments.out)
        tempfile.tempdir = None
    bad = [row for row in read(arguments.out) if row["half"] != "0" or row["left"] != "0"]
    if bad:
        sys.exit(f"{len(bad)} rows have something half, or left: {bad[0]}")


if __name__ == "__main__":
    main()
