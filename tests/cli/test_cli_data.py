"""Calibration data of every kind: which examples are read, and what the model gets of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.cli import answer, bert, checkpoint, files, invoke, pictures, sentences, texts, tiny, vit
from transformers import BertTokenizer, ViTImageProcessorPil

import hf_lambda_gelu as hlg


@pytest.fixture(autouse=True, scope="module")
def contained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No traces in the user's data set cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that `calibrate` is given from now on."""
    found: list[dict[str, Any]] = []
    verb = hlg.calibrate

    def watched(model: Any, batches: Any) -> hlg.CalibrationReport:
        assert len(list(batches)) == len(batches)
        found.extend(batches)
        return verb(model, found)

    monkeypatch.setattr(hlg, "calibrate", watched)
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table of that ending."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_csv(str(path)) if path.suffix == ".csv" else table.to_parquet(str(path))
    return path


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ending, a folder with splits and a saved data set: the tokens of the texts, in order."""
    bert(tmp_path / "src", hardness=2.0)
    rows = [{"text": text, "id": index, "other": "word1"} for index, text in enumerate(sentences(6))]
    sources: dict[Path, tuple[str, ...]] = {
        write_rows(tmp_path / f"rows.{end}", rows): () for end in ("csv", "json", "jsonl", "parquet")
    }
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.csv", rows[:2])
    write_rows(tmp_path / "folder" / "test.csv", rows)
    sources[tmp_path / "folder"] = ("--split", "test")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources[tmp_path / "saved"] = ()
    expected = BertTokenizer.from_pretrained(tmp_path / "src")([row["text"] for row in rows], padding=True)
    for source, options in sources.items():
        found = seen(monkeypatch)
        answer("calibrate", tmp_path / "src", "--calibration", source, *options)
        (batch,) = found
        assert batch["input_ids"].tolist() == expected["input_ids"], source
        assert batch["attention_mask"].tolist() == expected["attention_mask"]
        monkeypatch.undo()


def test_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--samples draws from the whole file, the same each time; --batch-size and --max-length cut."""
    bert(tmp_path / "src", hardness=2.0)
    path = texts(tmp_path / "texts.txt", 60)
    draws = []
    for _ in range(2):
        found = seen(monkeypatch)
        options = ("--samples", 20, "--batch-size", 6, "--max-length", 5)
        answer("calibrate", tmp_path / "src", "--calibration", path, *options)
        monkeypatch.undo()
        assert [len(batch["input_ids"]) for batch in found] == [6, 6, 6, 2]
        assert {batch["input_ids"].shape[1] for batch in found} == {5}
        draws.append(torch.cat([batch["input_ids"] for batch in found]))
    assert torch.equal(*draws)
    tokens = BertTokenizer.from_pretrained(tmp_path / "src")(sentences(60), padding=True, truncation=True, max_length=5)
    places = [tokens["input_ids"].index(row) for row in draws[0].tolist()]
    assert places == sorted(places)
    assert max(places) > 30


def test_names_of_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A csv's first line is never taken for them unasked; where a column is named, or the format holds names, it is read."""
    bert(tmp_path / "src", hardness=2.0)
    rows = [{"review": text, "stars": index % 2} for index, text in enumerate(sentences(6))]
    for end, options in {"csv": ("--column", "review"), "jsonl": (), "parquet": ()}.items():
        found = seen(monkeypatch)
        source = write_rows(tmp_path / f"rows.{end}", rows)
        answer("calibrate", tmp_path / "src", "--calibration", source, *options)
        assert len(found[0]["input_ids"]) == 6
        monkeypatch.undo()
    command = ("calibrate", tmp_path / "src", "--calibration", tmp_path / "rows.csv")
    assert "say --column review;" in invoke(*command, code=2).stderr
    with_labels = ("sensitivity", *command[1:], "--label-column", "stars")
    assert invoke(*with_labels).stdout


@pytest.mark.parametrize(("asked", "kept", "why"), [(5, 5, ""), (128, 7, ", as many as the model takes")])
def test_texts_that_are_cut_are_counted(tmp_path: Path, asked: int, kept: int, why: str) -> None:
    """Those that have more tokens, each with [CLS] and [SEP], than are taken; none is said of texts that fit."""
    bert(tmp_path / "src", hardness=2.0, max_position_embeddings=7)
    path = texts(tmp_path / "texts.txt", 30)
    longer = sum(len(text.split()) + 2 > kept for text in sentences(30))
    assert 0 < longer < 30
    said = invoke("calibrate", tmp_path / "src", "--calibration", path, "--max-length", asked).stderr
    assert f"{longer} of 30 texts have more than {kept} tokens and are cut to these{why}\n" in said
    bert(tmp_path / "long", hardness=2.0)
    assert "are cut" not in invoke("calibrate", tmp_path / "long", "--calibration", path).stderr


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures, and a table of them: pixels by the model's image processor; the refit takes them."""
    vit(tmp_path / "src")
    folder = pictures(tmp_path / "pictures")
    images = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    expected = ViTImageProcessorPil.from_pretrained(tmp_path / "src")(images=images, return_tensors="pt")["pixel_values"]
    columns = datasets.Features({"photo": datasets.Image()})
    table = datasets.Dataset.from_dict({"photo": [str(path) for path in sorted(folder.iterdir())]}, features=columns)
    table.save_to_disk(str(tmp_path / "table"))
    for source in (folder, tmp_path / "table"):
        found = seen(monkeypatch)
        answer("calibrate", tmp_path / "src", "--calibration", source)
        assert torch.equal(found[0]["pixel_values"], expected)
        monkeypatch.undo()
    line = ("relu-ize", tmp_path / "src", tmp_path / "relu", "--calibration", folder, "--compensate", "least_squares")
    answer(*line)
    assert (tmp_path / "relu" / "preprocessor_config.json").is_file()


def test_ready_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors by the names of forward's arguments, in .npy the main input; for models without a tokenizer too."""
    model = checkpoint(tmp_path / "whisper", "whisper", 2.0)
    batch = tiny.inputs(model)
    save_file(batch, tmp_path / "inputs.safetensors")
    found = seen(monkeypatch)
    answer("calibrate", tmp_path / "whisper", "--calibration", tmp_path / "inputs.safetensors", "--batch-size", 1)
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([part[name] for part in found]), tensor)
    monkeypatch.undo()
    checkpoint(tmp_path / "vit", "vit", 2.0)
    pixels = torch.randn(3, 3, 32, 32).numpy()
    np.save(tmp_path / "pixels.npy", pixels)
    found = seen(monkeypatch)
    answer("calibrate", tmp_path / "vit", "--calibration", tmp_path / "pixels.npy")
    assert np.array_equal(found[0]["pixel_values"].numpy(), pixels)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_other_language_models(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer without a padding token, and an encoder-decoder, whose decoder gets the text."""
    bert(tmp_path / "src", name, 2.0, **({"decoder_start_token_id": 0} if name == "t5" else {}))
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "src")
    if name == "gpt2":
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
        tokenizer.save_pretrained(tmp_path / "src")
    found = seen(monkeypatch)
    sites = answer("calibrate", tmp_path / "src", "--calibration", texts(tmp_path / "texts.txt", 8))["sites"]
    assert all(site["count"] for site in sites)
    mask = found[0]["attention_mask"]
    assert not bool(mask.all())
    if name == "t5":
        assert torch.equal(found[0]["decoder_input_ids"][:, 1:], found[0]["input_ids"][:, :-1])
        assert found[0]["decoder_input_ids"][:, 0].eq(0).all()


REFUSED: list[tuple[str, str, str]] = [
    ("missing.txt", "", "there are no data in"),
    ("rows.xls", "", "cannot read .* by its ending: expected .csv"),
    ("empty.txt", "", "holds no example"),
    ("latin.txt", "", "is no text in UTF-8"),
    ("folder", "", "there are no data in"),
    ("broken.json", "", "cannot be read|there are no data"),
    ("broken.safetensors", "", "holds no arrays of examples"),
    ("uneven.safetensors", "", "differ in their first dimension"),
    ("two.csv", "", "2 columns could hold the examples, of a, b, n: name one with --column"),
    ("two.csv", "--column c", "no column 'c', the data have a, b, n: --column"),
    ("two.csv", "--column n", "holds neither texts nor images"),
    ("two.csv", "--column a --split test", "has no split 'test', it has train: name one with --split"),
    ("two.csv", "--column a --label-column b", "the model knows no label 'word2'"),
    (
        "bare.csv",
        "",
        "it is not plain that 'a dull film' is one: if so, say --column 'a dull film'; if it is an example, put",
    ),
    ("tabbed", "", "it is not plain that 'a dull film' is one"),
    ("texts.txt", "--label-column b", "has no columns, so --label-column b"),
    ("pictures", "", "takes input_ids, and the data are images: pass a .safetensors"),
]


@pytest.mark.parametrize(("source", "options", "message"), REFUSED)
def test_refused(tmp_path: Path, source: str, options: str, message: str) -> None:
    """What was got and what to do; exit code 2; nothing is written."""
    bert(tmp_path / "src", hardness=2.0)
    data = tmp_path / "data"
    data.mkdir()
    texts(data / "texts.txt")
    (data / "rows.xls").write_bytes(b"")
    (data / "empty.txt").write_text("\n \n")
    (data / "latin.txt").write_bytes("café".encode("latin-1"))
    (data / "folder").mkdir()
    (data / "broken.json").write_text("{")
    (data / "broken.safetensors").write_bytes(b"no")
    save_file({"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(3, 3)}, data / "uneven.safetensors")
    (data / "two.csv").write_text("a,b,n\nword1,word2,1\n")
    (data / "bare.csv").write_text("a dull film,1\nfar too long,0\n")  # without a line of names
    (data / "tabbed").mkdir()
    (data / "tabbed" / "train.tsv").write_text("a dull film\t1\nfar too long\t0\n")
    pictures(data / "pictures", 1)
    before = files(tmp_path)
    line = ["relu-ize", tmp_path / "src", tmp_path / "dst", "--compensate", "bias", "--calibration", data / source]
    error = invoke(*line, *options.split(), code=2).stderr
    assert re.search(message, error), error
    assert files(tmp_path) == before


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """Texts for a model that came without: what else can be given."""
    checkpoint(tmp_path / "src", "bert-classifier", 2.0)
    error = invoke("calibrate", tmp_path / "src", "--calibration", texts(tmp_path / "texts.txt"), code=2).stderr
    assert "holds no tokenizer for the texts" in error
    assert "pass a .safetensors file" in error
