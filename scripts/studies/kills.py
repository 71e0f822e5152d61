"""Kills a tiny run, or fills its disk, at random and at chosen moments; resumes it, and compares its end with a twin's.

    python -m scripts.studies.kills            # every case that results/kills.csv lacks; a stopped study goes on
    python -m scripts.studies.kills --table    # what the table says, by kind

Each run is a fork of this process, which has imported transformers and computed nothing: a kill costs a second. The
signal is SIGKILL. Of two processes, one is killed, and then the other, as torchrun does it; of two runs, by torchrun itself.
Disks are filled by a limit to the size of a file (RLIMIT_FSIZE), and by a small tmpfs, which takes the right to mount one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lambda_gelu.training.resuming import checkpoints
from hf_lambda_gelu.training.whole_checkpoints import fault
from scripts.studies.killed_run import BEGUN, END, ENDED, SAVES, STARTED, STEPS, Engine, as_rank, train
from scripts.tools import tables

RESULTS = Path(__file__).parent / "results" / "kills.csv"
FIELDS = ("kind", "engine", "moment", "stopped_by", "left", "resumed_from", "hardness_equal", "weights_equal")
FILES = ("model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
LIMIT_SECONDS = 120
_POLL = 5e-5  # s


@dataclass(frozen=True)
class Case:
    """One interruption.

    Attributes:
        moment: what a reader is told of it; with `kind` and `engine`, the case's name.
        file: the kill waits for it to appear, in the run's folder.
        wait: then so long, as a fraction of the twin's training, or of its refit.
        rank: which process is killed.
        limit: bytes that a file, or the disk, can have.
    """

    kind: str
    engine: Engine
    moment: str
    file: str = ""
    wait: float = 0.0
    rank: int = 0
    limit: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.engine, self.moment


def cases() -> Iterator[Case]:
    """Every case, each run's random numbers its own."""
    dice = random.Random(0)
    engines: tuple[Engine, ...] = ("refit", "ramp")
    for engine in engines:
        for _ in range(10):
            share = dice.uniform(0.02, 0.98)
            yield Case("random", engine, f"at {share:.3f} of the run", f"../{STARTED}", share)
        for step in range(SAVES, STEPS + 1, SAVES):
            for name in FILES:
                yield Case("checkpoint", engine, f"step {step}, {name} appears", f"checkpoint-{step}/{name}")
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
        yield Case("refit", "refit", f"at {share} of the refit", f"../{BEGUN}", share)
    for rank in (0, 1):
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            yield Case(
                "one of two", "two processes", f"rank {rank}, step 6, {name} appears", f"checkpoint-6/{name}", 0.0, rank
            )
        for _ in range(3):
            share = dice.uniform(0.1, 0.95)
            yield Case(
                "one of two", "two processes", f"rank {rank}, at {share:.3f} of the run", f"../{STARTED}", share, rank
            )
        yield Case("one of two", "two processes", f"rank {rank}, at 0.5 of the refit", f"../{BEGUN}", 0.5, rank)
        yield Case(
            "torchrun", "two processes", f"rank {rank}, step 6, optimizer.pt appears", "checkpoint-6/optimizer.pt", 0.0, rank
        )
    for engine in engines:
        for kilobytes in (1, 4, 100, 2000, 3000, 5000):
            yield Case("file limit", engine, f"no file beyond {kilobytes} kB", limit=kilobytes * 1000)
        for kilobytes in (1000, 5000, 9000, 14000, 19000, 24000):
            yield Case("full disk", engine, f"{kilobytes} kB", limit=kilobytes * 1000)


def forked(folder: Path, function: Callable[[], None]) -> int:
    """The process id of a fork that runs `function`, its output in a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder.parent / f"{folder.name}-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def started(folder: Path, engine: Engine, resume: bool = False, limit: int = 0) -> list[int]:
    """The processes of a run."""
    world, port = 2 if engine == "two processes" else 1, _port()

    def run(rank: int) -> None:
        if world > 1:
            as_rank(rank, world, port)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train(folder, engine, resume)

    return [forked(folder, lambda rank=rank: run(rank)) for rank in range(world)]  # type: ignore[misc]


def launched(folder: Path, resume: bool = False) -> subprocess.Popen[bytes]:
    """A run of two processes by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={_port()}"]
    command = [*torchrun, "-m", "scripts.studies.killed_run", str(folder), *["--resume"] * resume]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "ACCELERATE_USE_CPU": "true"})


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def finished(processes: list[int]) -> bool:
    """Waits; whether all have ended by themselves, without an error."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
    return not any(codes)


def killed(case: Case, folder: Path, processes: list[int], seconds: float) -> bool:
    """Kills at the case's moment; whether the run was still there."""
    begin, waited, pid = time.monotonic(), folder / "run" / case.file, processes[case.rank]
    while case.file and not os.path.exists(waited) and time.monotonic() - begin < LIMIT_SECONDS and not _over(pid):
        time.sleep(_POLL)
    time.sleep(case.wait * seconds)
    there = not _over(pid)
    for other in (pid, *(other for other in processes if other != pid)):
        os.kill(other, signal.SIGKILL)  # of one that has ended nothing is left to kill
        os.waitpid(other, 0)
        time.sleep(0.2 * (len(processes) - 1))
    return there


def _over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@dataclass(frozen=True)
class Twin:
    """An uninterrupted run: its end, and the seconds that its training and its refit took."""

    end: dict[str, Any]
    seconds: float
    refit: float


def twin(folder: Path, engine: Engine) -> Twin:
    folder.mkdir()
    if not finished(started(folder, engine)):
        raise RuntimeError(f"the uninterrupted run ended with an error: see the logs in {folder.parent}")
    seconds = (folder / END).stat().st_mtime - (folder / STARTED).stat().st_mtime
    refit = (folder / ENDED).stat().st_mtime - (folder / BEGUN).stat().st_mtime
    return Twin(json.loads((folder / END).read_text()), seconds, refit)


def stopped(case: Case, folder: Path, reference: Twin) -> str:
    """Interrupts a run; by what, "nothing" if it came to its end first."""
    if case.limit:
        full = case.kind == "full disk"
        if full:
            (folder / "run").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={case.limit}", "tmpfs", str(folder / "run")], check=True)
        ended = finished(started(folder, case.engine, limit=0 if full else case.limit))
        return "nothing" if ended else "the run's own error"
    if case.kind == "torchrun":
        process = launched(folder)
        while not (folder / "run" / case.file).exists() and process.poll() is None:
            time.sleep(_POLL)
        os.kill(int((folder / f"pid-{case.rank}").read_text()), signal.SIGKILL)
        return "SIGKILL" if process.wait() else "nothing"
    seconds = reference.refit if case.file.endswith(BEGUN) else reference.seconds
    return "SIGKILL" if killed(case, folder, started(folder, case.engine), seconds) else "nothing"


def outcome(case: Case, folder: Path, reference: Twin) -> dict[str, Any]:
    """The row of one case."""
    folder.mkdir()
    mounted = case.kind == "full disk"
    try:
        by = stopped(case, folder, reference)
        found = next(checkpoints(folder / "run"), None)
        why = fault(found) if found else None
        left = "no checkpoint" if found is None else f"{found.name}: {why or 'whole'}"
        (folder / END).unlink(missing_ok=True)
        if mounted:  # more room
            subprocess.run(["mount", "-o", "remount,size=200m", str(folder / "run")], check=True)
        if case.kind == "torchrun":
            launched(folder, resume=True).wait()
        else:
            finished(started(folder, case.engine, resume=True))
        end = json.loads((folder / END).read_text()) if (folder / END).is_file() else {}
    finally:
        if mounted:
            subprocess.run(["umount", str(folder / "run")], check=False)
    equal = {name: end.get(name) == reference.end[name] for name in ("hardness", "learned", "weights")}
    return dict(zip(FIELDS, (*case.key, by, left, end.get("from", "no end")), strict=False)) | {
        "hardness_equal": equal["hardness"] and equal["learned"],
        "weights_equal": equal["weights"],
    }


def run(results: Path, wanted: list[Case]) -> None:
    """Adds the rows that `results` lacks."""
    known = {(row["kind"], row["engine"], row["moment"]) for row in tables.read(results)}
    wanted = [case for case in wanted if case.key not in known]
    with tempfile.TemporaryDirectory() as scratch:
        twins: dict[str, Twin] = {}
        for number, case in enumerate(wanted):  # no bar: it has a thread, and a fork would copy its locks
            if case.engine not in twins:
                twins[case.engine] = twin(Path(scratch, f"twin-{case.engine}"), case.engine)
            folder = Path(scratch, f"{number}")
            row = outcome(case, folder, twins[case.engine])
            tables.append(results, FIELDS, [row])
            print(f"{number + 1}/{len(wanted)}", *row.values(), sep="; ", flush=True)
            shutil.rmtree(folder)


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: the interrupted runs of each kind, what they left, and how many ended as their twin."""
    rows = [row for row in rows if row["stopped_by"] != "nothing"]
    lines = ["| kind | runs | left a broken checkpoint | went on from a checkpoint | ended as the twin, to the bit |"]
    lines += ["|---|---|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        counts = Counter[str]()
        for row in own:
            counts["broken"] += not row["left"].endswith(("whole", "no checkpoint"))
            counts["resumed"] += row["resumed_from"].startswith("checkpoint-")
            counts["equal"] += row["hardness_equal"] == row["weights_equal"] == "True"
        lines.append(f"| {kind} | {len(own)} | {counts['broken']} | {counts['resumed']} | {counts['equal']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--kinds", nargs="+", help="of these kinds alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    if not arguments.table:
        run(arguments.results, [case for case in cases() if not arguments.kinds or case.kind in arguments.kinds])
    print(table(tables.read(arguments.results)))


if __name__ == "__main__":
    main()
