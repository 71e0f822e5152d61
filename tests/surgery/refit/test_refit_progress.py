"""The bars of a refit: on a terminal alone, with the right totals, gone at an error, and without a say in the result."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import Tensor, nn

import hf_lambda_gelu as hlg


class Terminal(io.StringIO):
    """Takes what is written and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def converted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(3))).eval()
    hlg.convert(model)
    return model


def batches(count: int = 5) -> list[Tensor]:
    return [torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def refit(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, calibration: list[Tensor] | None = None) -> list[Tensor]:
    monkeypatch.setattr("sys.stderr", stream)
    model = converted()
    hlg.relu_ize(model, calibration=calibration or batches(), compensate="least_squares")
    return weights(model)


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 3 sites, before it passes over 5 batches; none without a terminal; the weights are the same to the bit."""
    terminal, pipe = Terminal(), io.StringIO()
    shown, silent = refit(monkeypatch, terminal), refit(monkeypatch, pipe)
    text = terminal.getvalue()
    for description, total in (("Reading the calibration set", 5), ("Running both networks", 5), ("Refitting", 3)):
        assert {int(n) for n in re.findall(rf"{description}: [^\r]*?\d+/(\d+) \[", text)} == {total}
    assert not re.search(r"Refitting|Reading|Running", pipe.getvalue())
    assert all(torch.equal(a, b) for a, b in zip(shown, silent, strict=True))


def test_gone_at_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal shows in the end, after a refit that fails at its first site: no bar."""
    terminal = Terminal()
    broken = [*batches(4), torch.full((4, 6), float("inf"))]
    with pytest.raises(hlg.CalibrationError, match="not finite"):
        refit(monkeypatch, terminal, broken)
    assert "Refitting" in terminal.getvalue()
    lines: dict[int, str] = {}
    row = 0
    for piece in re.split(r"(\r|\n|\x1b\[A)", terminal.getvalue()):
        if piece in ("\n", "\x1b[A"):
            row += 1 if piece == "\n" else -1
        elif piece and piece != "\r":
            lines[row] = piece + lines.get(row, "")[len(piece) :]
    assert not any("|" in line for line in lines.values()), lines
