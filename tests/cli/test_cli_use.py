"""How every command behaves: exit codes, one line for an error, what goes to stdout, help, completion, Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from support.cli import answer, bert, checkpoint, command, files, invoke, texts

import hf_lambda_gelu as hlg
from hf_lambda_gelu.cli import app
from hf_lambda_gelu.cli.work import to_dict

COMMANDS = ["convert", "relu-ize", "distill", "fold", "audit", "calibrate", "sensitivity", "verify", "push", "demo"]
GROUPS = {"export": ["onnx"]}  # commands of a group's own

# The package's own __init__ registers λ-GELU with transformers, and so needs it; the command line itself does not.
LIGHT = """
import os, sys, types
package = types.ModuleType("hf_lambda_gelu")
package.__path__ = [sys.argv.pop(1)]
sys.modules["hf_lambda_gelu"] = package
from hf_lambda_gelu.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "datasets", "huggingface_hub", "numpy"} & set(sys.modules)
    print("HEAVY", *heavy, file=sys.stderr)
"""


def light(*arguments: str, **env: str) -> str:
    """What the command line prints in a process that has no package beside it, and must import nothing heavy."""
    program = [sys.executable, "-c", LIGHT, str(Path(hlg.__file__).parent), *arguments]
    process = subprocess.run(program, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    assert process.stderr == "HEAVY\n"
    return process.stdout


def test_help_is_light_and_has_examples_that_parse() -> None:
    """The group's help names every command; each command's example is a line that the command takes."""
    shown = light("--help")
    listed = [line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == [*COMMANDS, *GROUPS]
    assert "..." not in shown.partition("Commands:")[2], "a description that was cut"
    group: Any = typer.main.get_command(app)
    within = {f"{name} {inner}": group.commands[name].commands[inner] for name, inners in GROUPS.items() for inner in inners}
    for name, single in {**{name: group.commands[name] for name in COMMANDS}, **within}.items():
        shown = invoke(*name.split(), "--help").stdout
        joined = shown.replace("\\\n", " ")
        lines = [line for line in joined.splitlines() if line.strip().startswith(f"hf-lambda-gelu {name}")]
        assert lines, shown
        for line in lines:
            single.make_context(name, shlex.split(line)[1 + len(name.split()) :])
        for option in ("--json", "--debug"):
            assert option in shown
        assert "token" not in [word for word in shown.split() if word.startswith("--")]


def test_completion_is_light() -> None:
    """Commands and options, in bash."""
    words = {"COMP_WORDS": "hf-lambda-gelu re", "COMP_CWORD": "1", "_HF_LAMBDA_GELU_COMPLETE": "complete_bash"}
    assert light(**words).split() == ["relu-ize"]


def test_version() -> None:
    """The installed one."""
    assert invoke("--version").stdout.strip() == f"hf_lambda_gelu {hlg.__version__}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "No such command 'nonsense'"),
        ("convert", "Missing argument 'SOURCE'"),
        ("convert a", "Missing argument 'TARGET'"),
        ("convert a b --nonsense", "No such option"),  # its quotes are of typer's version
        ("convert a b --init-hardness x", "Invalid value for '--init-hardness'"),
        ("relu-ize a b --compensate magic", "is not one of 'least_squares', 'bias'"),
        ("calibrate a --samples 0", "Invalid value for '--samples'"),
        ("export", "Missing command"),
        ("export onnx a", "Missing argument 'TARGET'"),
        ("push a", "Missing option '--repo-id'"),
    ],
)
def test_wrong_use(line: str, message: str) -> None:
    """One line that ends with where to look."""
    result = invoke(*line.split(), code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip().endswith("--help")


def test_errors_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens inside: the error's kind and text, no traceback without --debug; Ctrl-C is 130."""
    checkpoint(tmp_path / "src", "bert-classifier")

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(hlg, "audit", broken)
    error: BaseException = OSError("the disk\n  is gone")
    result = invoke("audit", tmp_path / "src", "--json", code=1)
    assert result.stderr.splitlines()[-1] == "error: OSError: the disk is gone. --debug shows where"
    assert result.stdout == ""
    for kind, code in ((hlg.FoldError, 1), (ValueError, 2), (hlg.CalibrationError, 2)):
        error = kind("no")
        assert invoke("audit", tmp_path / "src", code=code).stderr.splitlines()[-1] == "error: no"

    error = KeyboardInterrupt()
    from typer.testing import CliRunner

    stopped = CliRunner().invoke(app, ["audit", str(tmp_path / "src")])
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert "interrupted" in stopped.stderr

    def torn(*_: object) -> None:  # what torch does where a stop reaches it while it reads an argument
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(hlg, "audit", torn)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    stopped = CliRunner().invoke(app, ["audit", str(tmp_path / "src")])
    assert (stopped.exit_code, stopped.stderr.splitlines()[-1]) == (130, "interrupted: nothing was left half done")
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    monkeypatch.setattr(hlg, "audit", broken)
    error = OSError("gone")
    debugged = CliRunner().invoke(app, ["audit", str(tmp_path / "src"), "--debug"])
    assert debugged.exit_code == 1
    assert "Traceback" in debugged.stderr
    assert "in broken" in debugged.stderr
    assert debugged.stdout == ""


def test_stdout_holds_the_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model's code prints goes to stderr."""
    checkpoint(tmp_path / "src", "bert-classifier")
    verb = hlg.audit

    def chatty(*arguments: Any) -> hlg.AuditReport:
        print("loading the model of models")
        return verb(*arguments)

    monkeypatch.setattr(hlg, "audit", chatty)
    assert answer("audit", tmp_path / "src")["counts"]["gelu"] == 2
    assert "model of models" in invoke("audit", tmp_path / "src").stderr


def test_to_dict() -> None:
    """Reports in reports, and what JSON cannot hold."""

    @dataclass
    class Inner:
        where: Path
        values: tuple[float, ...]

    @dataclass
    class Outer:
        inner: Inner
        names: dict[int, Any]

    found = to_dict(Outer(Inner(Path("a/b"), (1.5, float("nan"), float("inf"))), {1: {"x"}, 2: None, 3: True}))
    assert found == {"inner": {"where": "a/b", "values": [1.5, None, None]}, "names": {"1": ["x"], "2": None, "3": True}}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_ctrl_c_in_the_refit(tmp_path: Path) -> None:
    """On a terminal there are bars. SIGINT while it works: 130, one line, nothing is left, and no traceback."""
    bert(tmp_path / "src")
    data = texts(tmp_path / "texts.txt", 4000)
    (tmp_path / "tmp").mkdir()
    before = files(tmp_path)
    line = ["relu-ize", tmp_path / "src", tmp_path / "dst", "--calibration", data, "--compensate", "least_squares"]
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a new one has no columns
    root = str(Path(hlg.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_lambda_gelu.cli", *map(str, line), "--samples", "4000"],
        stdout=subprocess.PIPE,
        stderr=other,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job would ignore
    )
    os.close(other)
    shown = read_until(terminal, b"Loading weights")
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    shown += read_until(terminal, None)
    stdout, _ = process.communicate(timeout=60)
    text = shown.decode(errors="replace")
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert text.rstrip().endswith("interrupted: nothing was left half done")
    assert stdout == b""
    assert files(tmp_path) == before


def read_until(terminal: int, wanted: bytes | None) -> bytes:
    """What a terminal shows up to some text, or to its end."""
    shown = b""
    while wanted is None or wanted not in shown:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other side was closed
            piece = b""
        if not piece:
            assert wanted is None, shown.decode(errors="replace")
            break
        shown += piece
    return shown


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """Exit code, streams and files of a command that is refused, and of one whose reader goes away."""
    bert(tmp_path / "src")
    before = files(tmp_path)
    refused = command("fold", tmp_path / "src", tmp_path / "dst", "--json")
    reader, writer = os.pipe()
    os.close(reader)
    root = str(Path(hlg.__file__).parent.parent)
    program = [sys.executable, "-m", "hf_lambda_gelu.cli", "audit", str(tmp_path / "src")]
    env = {**os.environ, "PYTHONPATH": root}
    unread = subprocess.Popen(program, stdout=writer, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writer)
    stdout, stderr = refused.communicate(timeout=120)
    assert (refused.returncode, stdout) == (2, "")
    assert stderr == "error: BertForSequenceClassification has no λ-GELU to fold: call convert(model) first\n"
    assert unread.communicate(timeout=120)[1] == ""
    assert unread.returncode == 1
    assert files(tmp_path) == before
