"""Damaged folders: nothing but an error of the package comes out, nothing is made, and what is made loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support.models import relu_model

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import REPORT_NAME
from hf_lambda_gelu.structure.loading import load_saved
from scripts.tools.damage import KINDS, RESULTS, VERBS, draw, folders, tried
from scripts.tools.tables import read


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that are damaged."""
    return folders(tmp_path_factory.mktemp("whole"))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**60))
def test_any_damage(made: dict[str, Path], tmp_path: Path, number: int) -> None:
    """A sample of what `make fuzz` tries."""
    drawn = draw(number, sorted(made))
    note(str(drawn))
    assert tried(drawn, made, tmp_path) in ("refused", "made")


def test_the_table_of_damages() -> None:
    """5,000 inputs: each verb with each kind of edit, some refused and some harmless."""
    rows = read(RESULTS)
    assert {(row["verb"], row["edit"]) for row in rows} == {(verb, kind) for verb in VERBS for kind in KINDS}
    assert sum(int(row["inputs"]) for row in rows) >= 5000
    assert all(int(row["inputs"]) == int(row["refused"]) + int(row["made"]) > 0 for row in rows)
    assert sum(int(row["refused"]) for row in rows) > 2000
    assert sum(int(row["made"]) for row in rows) > 500


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "llama", "architectures": ["Linear"]}', "names the class 'Linear', which"),
        ("config.json", '{"model_type": "llama", "architectures": [["a"]]}', r"config\.json' makes no config: TypeError"),
        (
            "config.json",
            '{"model_type": "llama", "num_hidden_layers": 1000000000}',
            "num_hidden_layers = 1000000000: expected at",
        ),
        ("config.json", "[" * 100_000, r"config\.json' makes no config: RecursionError"),
        ("generation_config.json", '"text"', r"generation_config\.json' makes no generation config"),
    ],
)
def test_named(made: dict[str, Path], tmp_path: Path, name: str, text: str, message: str) -> None:
    """The file, and what is wrong with it, before anything is made."""
    source = tmp_path / "llama"
    source.mkdir()
    for path in made["llama"].iterdir():
        (source / path.name).symlink_to(path)
    (source / name).unlink()
    (source / name).write_text(text)
    with pytest.raises(hlg.CheckpointError, match=message):
        hlg.convert_checkpoint(source, tmp_path / "out")
    if name == "config.json":
        with pytest.raises(hlg.CheckpointError, match=message):
            load_saved(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[1]", '"card"', "{", "3"])
def test_a_record_that_is_none(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named before the proof, which takes long, and kept as it is."""
    model = relu_model()
    folder = hlg.save_relu_pretrained(model, tmp_path / "relu")
    (folder / REPORT_NAME).write_text(text)
    never: Callable[..., None] = lambda *_: pytest.fail("the proof was made")  # noqa: E731
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.verify.reloaded", never)
    with pytest.raises(hlg.CheckpointError, match=r"lambda_gelu\.json' is damaged"):
        hlg.verify_relu_pretrained(model, folder)
    assert (folder / REPORT_NAME).read_text() == text
