"""TensorBoard, Weights & Biases and Trackio: read back, they have λ of every layer, and a picture of the right λ."""

from __future__ import annotations

import io
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.training import SITES, converted, logged, trainer_of

from hf_lambda_gelu.training.pictures import ProfilePictures

LEARNED = (1.2, 1.8)
# of matplotlib's viridis, at 0 and 0.9
COLOURS = ((68, 1, 84), (187, 223, 39))
TITLES = ["λ as learned, at the switch (step 2)", "λ at the end (step 4)"]


def bars(picture: bytes) -> list[int]:
    """Heights of the bars of the first panel, in pixels, by their colours."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(picture)) as image:
        image.verify()
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    panel = pixels[:, : pixels.shape[1] // 3]
    return [int((np.abs(panel - colour).max(-1) <= 3).sum(0).max()) for colour in COLOURS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A run that reports to all three; λ = 1.2 and 1.8 at its switch, 159.6 at its end."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    folder = tmp_path_factory.mktemp("run")
    names = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": "wandb", "TRACKIO_DIR": "trackio"}
    names |= {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_CONFIG_DIR": "config"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            literal = name in ("WANDB_MODE", "WANDB_SILENT")
            patch.setenv(name, value if literal else str(folder / value))
        (folder / "wandb").mkdir()
        for name, module in list(sys.modules.items()):  # it read the variable when it was imported
            for attribute, part in (("TRACKIO_DIR", ""), ("MEDIA_DIR", "media"), ("ARTIFACTS_DIR", "artifacts")):
                if name.startswith("trackio") and hasattr(module, attribute):
                    patch.setattr(module, attribute, folder / "trackio" / part)
        trainer = trainer_of(
            converted(),
            folder / "run",
            max_steps=4,
            hardness_compensate="least_squares",
            hardness_switch_point=0.5,
            hardness_learning_rate=0.0,
            report_to=["tensorboard", "wandb", "trackio"],
            run_name="mine",
            trackio_static_space_id=False,
            eval_strategy="steps",
            eval_steps=2,
        )
        for site, value in zip(SITES, LEARNED, strict=True):
            trainer.model.get_submodule(site).set_hardness(value)
        trainer.train()
        import wandb

        wandb.finish()
        yield folder, trainer


def check(pictures: list[bytes], scalars: dict[str, list[float]], trainer: Any) -> None:
    switch, end = map(bars, pictures)
    assert switch[0] / switch[1] == pytest.approx((LEARNED[0] - 1) / (LEARNED[1] - 1), abs=0.02)
    assert end[0] == pytest.approx(end[1], abs=1)
    assert min(end) > 200
    for site in SITES:
        assert scalars[f"train/hardness/{site}"] == pytest.approx(
            list(logged(trainer, f"hardness/{site}").values()), rel=1e-6
        )
        assert len(scalars[f"train/hardness/{site}"]) == 4


def test_tensorboard(run: tuple[Path, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, trainer = run
    (place,) = (folder / "run" / "runs").iterdir()
    events = EventAccumulator(str(place))
    events.Reload()
    images = events.Images("hardness/profile")
    assert [image.step for image in images] == [2, 4]
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    check([image.encoded_image_string for image in images], scalars, trainer)


def records(content: bytes) -> Iterator[bytes]:
    """Those of a LevelDB log, in blocks of 32 KiB; a record that crosses their bounds is in pieces."""
    place, pieces = 7, b""  # of the file's own header
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def test_weights_and_biases(run: tuple[Path, Any]) -> None:
    from wandb.proto import wandb_internal_pb2

    folder, trainer = run
    (place,) = (folder / "wandb" / "wandb").glob("offline-run-*")
    (log,) = place.glob("run-*.wandb")
    rows = []
    for data in records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row |= {name: {**row.get(name, {}), inner[0]: value}} if inner else {name: value}
            rows.append(row)
    images = [row["hardness/profile"] for row in rows if "hardness/profile" in row]
    assert [image["caption"] for image in images] == TITLES
    assert [row["train/global_step"] for row in rows if "hardness/profile" in row] == [2, 4]
    scalars: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("train/hardness/"):
                scalars.setdefault(key, []).append(value)
    check([(place / "files" / image["path"]).read_bytes() for image in images], scalars, trainer)


def test_trackio(run: tuple[Path, Any]) -> None:
    folder, trainer = run
    (database,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by id")]
    images = [row["hardness/profile"] for row in rows if "hardness/profile" in row]
    assert [image["caption"] for image in images] == TITLES
    scalars: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("train/hardness/"):
                scalars.setdefault(key, []).append(value)
    check([(folder / "trackio" / "media" / image["file_path"]).read_bytes() for image in images], scalars, trainer)


def test_a_logger_that_fails_and_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on to its end, with the scalars."""
    pytest.importorskip("tensorboard")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    def build() -> Any:
        trainer = trainer_of(converted(), tmp_path, max_steps=4, hardness_switch_point=0.5, report_to="tensorboard")
        trainer.train()
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", refuse)
        assert build().state.global_step == 4
    assert caplog.text.count("TensorBoardCallback did not take the picture of λ: OSError('no space left')") == 2
    caplog.clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert build().state.global_step == 4
    assert "picture" not in caplog.text
    assert len(list((tmp_path / "runs").iterdir())) >= 1


def test_without_loggers_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr("hf_lambda_gelu.training.pictures.hardness_figure", refuse)
    trainer = trainer_of(converted(), tmp_path, max_steps=2, hardness_switch_point=0.5)
    trainer.train()
    assert any(isinstance(each, ProfilePictures) for each in trainer.callback_handler.callbacks)
