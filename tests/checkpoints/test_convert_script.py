"""scripts/convert_checkpoint.py, both ways."""

from __future__ import annotations

from pathlib import Path

import convert_checkpoint as script
import pytest
from support.folders import inodes, sharded


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways, its options, and errors without a traceback."""
    src, lam, relu = sharded(tmp_path), tmp_path / "lambda", tmp_path / "relu"
    script.main(["--source", str(src), "--target", str(lam), "--init_hardness", "90", "--copy"])
    assert "converted 3 activations to λ-GELU at λ = 90" in capsys.readouterr().out
    assert not inodes(src) & inodes(lam)
    with pytest.raises(SystemExit, match="gates are soft"):
        script.main(["--source", str(lam), "--target", str(relu), "--to", "relu"])
    script.main(["--source", str(lam), "--target", str(relu), "--to", "relu", "--tolerance", "0.01"])
    assert "3 activations are ReLU now\n" in capsys.readouterr().out
    assert inodes(lam) > inodes(relu)
    script.main(["--source", str(lam), "--target", str(tmp_path / "forced"), "--to", "relu", "--force"])
    with pytest.raises(SystemExit, match="exists and is not empty"):
        script.main(["--source", str(src), "--target", str(lam)])
