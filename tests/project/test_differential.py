"""The differential test of the refit: a seeded sample of it, and that it sees what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import module_in_fork

from hf_lambda_gelu.measurement.towers import Tower
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.ridge import Correction
from scripts.differential import run
from scripts.differential.one import compare
from scripts.differential.reference import solution
from scripts.tools.tables import read


def test_sample() -> None:
    """Drawn from the most used under all conditions; none is wrong, and a refusal leaves the model as it was."""
    options = ["--jobs", "1", "--sample", "4", "--seed", "3"]
    options += ["--models", "bert", "gpt2", "t5", "vit", "xlnet", "mixtral", "--conditions", "padded", "packed", "compiled"]
    process = module_in_fork("scripts.differential.run", *options)
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    assert process.stdout.count("model_type") + process.stderr.count("model_type") == 4


@pytest.mark.parametrize(
    ("name", "condition"), [("bert", "autocast"), ("t5", "wrapped"), ("mixtral", "cached"), ("xlnet", "chunked")]
)
def test_equal_in_a_context(name: str, condition: str) -> None:
    """Within autocast too to fp32's accuracy: own sums and targets are not of half precision."""
    row = compare(name, condition)
    assert row["verdict"] == "equal", row["reason"]
    assert row["distance"] < 1e-5
    assert "least_squares" in row["methods"]


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("jetmoe", "padded"),  # experts get pieces of rows that are taken together
        ("sam3_lite_text_text_model", "padded"),  # a text as an image of height one
        ("aimv2_vision_model", "autocast"),  # hidden states whose channels do not come last in memory
        ("longformer", "chunked"),  # padded to whole windows inside
    ],
)
def test_equal_where_rows_are_hard_to_tell(name: str, condition: str) -> None:
    row = compare(name, condition)
    assert row["verdict"] == "equal", row["reason"]
    assert row["distance"] < 1e-5


def test_equal_to_the_reference() -> None:
    row = compare("bert", "padded")
    assert row["verdict"] == "equal", row["reason"]
    assert row["distance"] < 1e-5
    assert (row["sites"], row["rows"], row["padding"]) == (2, 296, 64)  # 2 sites × 15 texts of 12 positions
    assert row["change"] < 1.0


def test_wrong_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A correction that is off by a thousandth of its largest element."""
    right = engine.decide

    def wrong(*args: object, **kwargs: object) -> object:
        correction, verdict = right(*args, **kwargs)
        if correction.weight is not None:
            weight = correction.weight + 1e-3 * correction.weight.abs().max()
            correction = Correction(weight, correction.bias, correction.method, correction.ridge)
        return correction, verdict

    monkeypatch.setattr(engine, "decide", wrong)
    row = compare("bert", "padded")
    assert "least_squares" in row["methods"]
    assert row["verdict"] == "WRONG"
    assert row["distance"] > 1e-4


def test_wrong_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that counts as tokens."""
    monkeypatch.setattr(Tower, "padded", False)
    row = compare("bert", "padded")
    assert row["verdict"] == "WRONG"
    assert "rows were counted" in row["reason"]


def test_solution_is_the_ridge_regression() -> None:
    """Against the normal equations."""
    generator = np.random.default_rng(0)
    r, e = generator.normal(size=(40, 6)) + 3.0, generator.normal(size=(40, 2))
    weight, bias = solution(r, e, "least_squares", 0.1, True)
    centred = r - r.mean(0)
    gram = centred.T @ centred
    expected = np.linalg.solve(gram + 0.1 * np.trace(gram) / 6 * np.eye(6), centred.T @ (e - e.mean(0)))
    np.testing.assert_allclose(weight, expected, rtol=1e-10)
    np.testing.assert_allclose(bias, e.mean(0) - r.mean(0) @ expected, rtol=1e-9)
    assert torch.tensor(solution(r, e, "none", None, True)[0]).abs().max() == 0


def test_table_has_no_wrong_row() -> None:
    rows = read(run.RESULTS)
    assert len(rows) > 1000
    assert [(row["model_type"], row["condition"]) for row in rows if row["verdict"] == "WRONG"] == []


def test_rows_are_replaced_and_summed(tmp_path: Path) -> None:
    results = tmp_path / "differential.csv"
    row = dict.fromkeys(run.FIELDS, "") | {"model_type": "bert", "condition": "padded", "sites": "2", "rows": "9"}
    for verdict in ("WRONG", "equal"):
        run.append(results, row | {"verdict": verdict})
    assert [found["verdict"] for found in read(results)] == ["equal"]
    assert "Equal: 2 sites, 9 rows." in run.table(read(results))
    assert "WRONG: bert" in run.table([row | {"verdict": "WRONG", "reason": "1.0e-01"}])
