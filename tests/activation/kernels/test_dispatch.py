"""Which kernels run: the choice, the compiler that builds them, what is said where there is none."""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import pytest
import torch
from support.kernel_runs import OP, check, draw, run
from support.processes import in_fork

import hf_lambda_gelu as hlg
from hf_lambda_gelu.activation.kernels import compiled, cpu, dispatch, layout


def test_hardness_that_no_view_takes() -> None:
    """Dimensions with a gap between them: no fused kernel, so torch's operations without a word, or the error asked for."""
    x, hardness = draw(4, 3, 5), 1 + torch.rand(4, 1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(x, hardness, x, "gelu", run(x, hardness, x, "gelu"))
    before = hlg.set_kernels("fused")
    try:
        with pytest.raises(
            hlg.KernelUnavailable, match=r"λ of shape \(4, 1, 5\) over x of shape \(4, 3, 5\); hlg.set_kernels"
        ):
            OP.forward(x, hardness, "gelu")
        with pytest.raises(hlg.KernelUnavailable, match=r"no fused kernel for torch\.float64 on cpu"):
            hlg.lambda_gelu(x.double(), 2.0)
    finally:
        hlg.set_kernels(before)


def test_a_base_that_no_kernel_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that was added without a kernel runs on torch's operations, and not on another base's kernel."""
    monkeypatch.delitem(layout.BASE_NUMBERS, "silu")
    x, hardness = draw(4, 3), torch.tensor([2.0])
    check(x, hardness, x, "silu", run(x, hardness, x, "silu"))
    before = hlg.set_kernels("fused")
    try:
        with pytest.raises(hlg.KernelUnavailable, match=r"no fused kernel for the base 'silu'"):
            hlg.lambda_gelu(x, 2.0, base="silu")
    finally:
        hlg.set_kernels(before)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/nowhere/g++", "no C++ compiler found (looked for /nowhere/g++); install g++ or set CXX"),
        ("broken", "broken failed: no such flag"),
    ],
)
def test_without_a_compiler(compiler: str, message: str, tmp_path: Path) -> None:
    """One warning that says what is missing, then torch's operations; asked for outright, an error that says the same."""
    code = """
        import warnings, torch, hf_lambda_gelu as hlg
        x = torch.randn(50, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                hlg.lambda_gelu(x, 2.0).sum().backward()
        assert torch.allclose(hlg.lambda_gelu(x, 2.0), hlg.lambda_gelu_reference(x, 2.0), atol=1e-6)
        print(len(caught), caught[0].message)
        hlg.set_kernels("fused")
        try:
            hlg.lambda_gelu(x, 2.0)
        except hlg.KernelUnavailable as error:
            print(error)
        hlg.set_kernels("torch")
        hlg.lambda_gelu(x, 2.0)
    """
    if compiler == "broken":
        script = tmp_path / compiler
        script.write_text(f"#!/bin/sh\necho tried >> {tmp_path}/log\necho no such flag >&2\nexit 1\n")
        script.chmod(0o755)
        compiler = str(script)
    done = in_fork(code, env={**os.environ, "CXX": compiler, "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1 λ-GELU runs on torch's own operations")
    assert all(message in " ".join(part.split()) for part in (lines[0], " ".join(lines[1:])))
    assert not list(tmp_path.rglob("*.so"))
    assert compiler.startswith("/nowhere") or (tmp_path / "log").read_text() == "tried\n"  # once, not at every call


def test_built_once(tmp_path: Path) -> None:
    """Processes that start at once make one file, and a later one finds it without any compiler."""
    code = """
        import os, sys, torch, hf_lambda_gelu as hlg
        for _ in range(int(sys.argv[1])):
            child = os.fork()
            if not child:
                hlg.set_kernels("fused")
                os.write(1, f"{hlg.lambda_gelu(torch.tensor([1.0]), 1.0).item()} ".encode())
                os._exit(0)
        for _ in range(int(sys.argv[1])):
            os.wait()
    """

    def values(processes: int) -> list[float]:
        done = in_fork(code, str(processes), env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr[-3000:]
        return [float(value) for value in done.stdout.split()]

    assert values(2) == pytest.approx([0.8413447] * 2)
    (built,) = tmp_path.rglob("*.so")
    made = built.stat().st_mtime_ns
    assert values(1) == pytest.approx([0.8413447])
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")] == [made]


def test_a_header_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built with another header is not taken for it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(compiled, "_HEADERS", tmp_path)
    source = tmp_path / "answer.cpp"
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }\n')
    for number in (41, 42):
        (tmp_path / "number.h").write_text(f"#define NUMBER {number}\n")
        assert compiled.Library(source, {"answer": (0, 0, 0)}, ctypes.c_int).loaded().answer() == number


def test_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is then built for this process alone."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(blocked))
    folder = compiled.folder()
    assert folder.is_dir()
    assert blocked not in folder.parents
    assert compiled.folder() == folder


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match="unknown choice of kernels 'fast': expected 'auto', 'fused' or 'torch'"):
        hlg.set_kernels("fast")
    assert dispatch._choice == "auto"


def test_reference_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "torch" keeps the fused kernel from running at all."""
    monkeypatch.setattr(cpu, "forward", None)
    before = hlg.set_kernels("torch")
    try:
        assert hlg.lambda_gelu(torch.tensor([1.0]), 1.0).item() == pytest.approx(0.8413447)
    finally:
        assert hlg.set_kernels(before) == "torch"
