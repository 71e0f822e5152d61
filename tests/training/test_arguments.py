"""LambdaGELUTrainingArguments: ranges, and the command line."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.training import arguments
from transformers import HfArgumentParser, TrainingArguments

import hf_lambda_gelu as hlg


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hardness_switch_point": -0.1}, r"switch point .*\[0, 1\], got -0\.1"),
        ({"hardness_switch_point": 1.1}, r"switch point .*\[0, 1\], got 1\.1"),
        ({"hardness_switch_point": math.nan}, r"switch point .*\[0, 1\], got nan"),
        ({"hardness_hold": -0.5}, r"hold fraction .*\[0, 1\], got -0\.5"),
        ({"hardness_switch_point": 0.7, "hardness_hold": 0.4}, r"0\.7 .* 0\.4 = 1\.1 .*must not exceed 1"),
        ({"hardness_tolerance": math.nan}, r"tolerance must be a finite number > 0.*, got nan"),
        ({"hardness_tolerance": -1.0}, r"tolerance must be a finite number > 0.*, got -1\.0"),
        ({"hardness_tolerance": 0.0}, r"tolerance must be a finite number > 0.*, got 0\.0"),
        ({"hardness_relative_tolerance": 0.0}, r"relative tolerance must be a finite number > 0.*, got 0\.0"),
        ({"hardness_relative_tolerance": math.inf}, r"relative tolerance must be a finite number > 0.*, got inf"),
        ({"hardness_target": "measured"}, r"unknown hardness_target 'measured': expected 'l1' or 'calibrated'"),
        ({"hardness_ramp": "exponential"}, r"'exponential': expected one of geometric, linear, cosine, reciprocal"),
        ({"hardness_learning_rate": math.nan}, r"hardness_learning_rate must be a .*number >= 0, got nan"),
        ({"hardness_learning_rate": math.inf}, r"hardness_learning_rate must be a .*number >= 0, got inf"),
        ({"hardness_learning_rate": -0.01}, r"hardness_learning_rate must be a .*number >= 0, got -0\.01"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    """Refused by the arguments alone, with the value that was got and the range that is expected."""
    with pytest.raises(ValueError, match=expected):
        arguments(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_command_line_of_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Every field that the class adds to TrainingArguments is on the command line, with a help text, and parses."""
    added = {f.name: f for f in fields(hlg.LambdaGELUTrainingArguments)}
    for field in fields(TrainingArguments):
        added.pop(field.name)
    parser = HfArgumentParser(hlg.LambdaGELUTrainingArguments)
    actions = {action.dest: action for action in parser._actions}
    assert {name for name in added if name.startswith("hardness_")} == {
        f"hardness_{name}"
        for name in (
            *("learning_rate", "switch_point", "compensate", "ramp", "hold"),
            *("target", "tolerance", "relative_tolerance", "hinges", "budget"),
        )
    }
    shown = parser.format_help()
    for name in added:
        assert f"--{name}" in shown
        assert len(actions[name].help) > 30, name
    assert list(actions["hardness_ramp"].choices) == ["geometric", "linear", "cosine", "reciprocal"]

    line = "--output_dir out --hardness_learning_rate 0.5 --hardness_switch_point 0.4 --hardness_ramp cosine"
    line += " --hardness_tolerance 0.01 --hardness_hold 0.2 --eval_relu false"
    line += " --hardness_target calibrated --hardness_relative_tolerance 0.03 --hardness_compensate bias"
    (parsed,) = parser.parse_args_into_dataclasses(line.split())
    got = [getattr(parsed, f"hardness_{n}") for n in ("learning_rate", "switch_point", "ramp", "tolerance", "hold")]
    assert got == [0.5, 0.4, "cosine", 0.01, 0.2]
    assert (parsed.hardness_target, parsed.hardness_relative_tolerance) == ("calibrated", 0.03)
    assert parsed.hardness_compensate == "bias"
    assert parsed.eval_relu is False
    (default,) = parser.parse_args_into_dataclasses(["--output_dir", "out"])
    assert (default.hardness_switch_point, default.hardness_tolerance, default.eval_relu) == (0.75, 0.005, True)
    assert (default.hardness_compensate, default.hardness_target) == ("least_squares", "l1")
    assert (default.hardness_target, default.hardness_relative_tolerance) == ("l1", 0.01)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--hardness_ramp", "exponential"])
    assert "'geometric', 'linear', 'cosine', 'reciprocal'" in capsys.readouterr().err.replace("invalid choice", "")
