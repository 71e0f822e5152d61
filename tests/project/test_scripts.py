"""The fine-tuning scripts on tiny local models and data; their results are recomputed by stock transformers."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support import tiny
from support.hub_server import HubServer
from support.processes import module_in_fork
from support.texts import NAMES, text_model, text_rows, write_csv
from torch.nn import functional as F
from transformers import BertForSequenceClassification, BertTokenizer, ViTImageProcessorPil

import hf_lambda_gelu as hlg
from scripts.tools.warm_stock import run_in_stock

# Classifies rows in a process that cannot import the package; prints the class names.
STOCK = """
import csv, json, sys
sys.modules["hf_lambda_gelu"] = None  # any import of it raises
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer
)
torch.set_num_threads(1)
out = {}
for name, kind, folder, source, columns in json.loads(sys.argv[1]):
    if kind == "text":
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        rows = [[row[c] for c in columns] for row in csv.DictReader(open(source))]
        inputs = [tokenizer(*row, return_tensors="pt") for row in rows]
    else:
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        inputs = [processor(Image.open(path).convert("RGB"), return_tensors="pt") for path in columns]
    assert not model.training
    with torch.no_grad():
        out[name] = [model.config.id2label[int(model(**i).logits.argmax())] for i in inputs]
print("CLASSES" + json.dumps(out))
"""
SHADE = 40  # so little that not every picture is recognised


@pytest.fixture(autouse=True, scope="module")
def contained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, and no traces in the user's data set cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
    torch.set_num_threads(threads)


def write_images(folder: Path) -> Path:
    """train/ and test/ with a folder of pictures per class, grey and colour; bright above or bright below."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("test", 6)):
        for name in ("above", "below"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 120, (40, 40, 3), generator=generator, dtype=torch.uint8)
                pixels[slice(0, 20) if name == "above" else slice(20, 40)] += SHADE
                image = Image.fromarray(pixels.numpy()).convert("L" if index % 2 else "RGB")
                image.save(folder / split / name / f"{index}.png")
    return folder


COMMON = "--num_train_epochs 4 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --learning_rate 3e-3"
COMMON += " --logging_steps 1 --save_strategy epoch --report_to none --disable_tqdm true --dataloader_pin_memory false"
COMMON += " --use_cpu true --seed 5"


def run(script: str, model: Path, output: Path, options: str) -> dict[str, Any]:
    """`main` of a script, with what it returned checked against the file that it wrote."""
    line = f"--model_name_or_path {model} --output_dir {output} {COMMON} {options}"
    results = importlib.import_module(f"scripts.{script}").main(line.split())
    assert json.loads((output / "results.json").read_text()) == results
    return results


def state_of(output: Path) -> dict[str, Any]:
    """trainer_state.json of the last checkpoint."""
    last = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, tuple[Path, dict[str, Any], list[str]]]:
    """{name: output folder, results, classes that stock transformers predicts with the folder relu/}, and the truth."""
    folder = tmp_path_factory.mktemp("runs")
    test = text_rows(30, 1)
    train_file = write_csv(folder / "train.csv", text_rows(48, 0))
    test_file = write_csv(folder / "test.csv", test)
    files = f"--train_file {train_file} --validation_file {test_file}"
    text = run("finetune_text", model, folder / "text", f"{files} --text_column first --text_pair_column second")

    # a processor of another size, which --image_size must correct in the saved folder too
    vit = folder / "vit"
    tiny.build("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(vit)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(vit)
    pictures = write_images(folder / "pictures")
    ramp = "--hardness_compensate none --hardness_switch_point 0.25"  # the text run has the default, a refit
    image = run("finetune_image", vit, folder / "image", f"--dataset_name {pictures} --image_size 32 {ramp}")

    paths = sorted(str(path) for path in (pictures / "test").glob("*/*.png"))
    jobs = [
        ("text", "text", str(folder / "text" / "relu"), str(test_file), ["first", "second"]),
        ("image", "image", str(folder / "image" / "relu"), "", paths),
    ]
    process = run_in_stock(STOCK, [json.dumps(jobs)], str(folder), os.environ)
    assert process.returncode == 0, process.stderr[-2000:]
    classes = json.loads(process.stdout.partition("CLASSES")[2])
    truth = {"text": [row["label"] for row in test], "image": [Path(path).parent.name for path in paths]}
    return {
        name: (folder / name, results, [f"{a} {b}" for a, b in zip(classes[name], truth[name], strict=True)])
        for name, results in (("text", text), ("image", image))
    }


def test_push_to_hub(tmp_path: Path, model: Path) -> None:
    """`--push_to_hub` publishes the ReLU network, tokenizer and card in one commit, beside what is pushed while training."""
    train = write_csv(tmp_path / "train.csv", text_rows(16, 0))
    test = write_csv(tmp_path / "test.csv", text_rows(8, 1))
    options = f"--model_name_or_path {model} --train_file {train} --validation_file {test} --output_dir {tmp_path / 'out'}"
    options += " --text_column first --max_steps 2 --save_strategy no --report_to none --use_cpu true"
    with HubServer(token="hf_test") as hub:
        options += " --push_to_hub --hub_model_id tester/tiny"
        process = module_in_fork("scripts.finetune_text", *options.split(), env=hub.env(tmp_path / "home"))
        assert process.returncode == 0, process.stderr[-3000:]
        files = hub.repos["tester/tiny"].files
        assert len(hub.repos["tester/tiny"].commits) == 1
    assert json.loads(files["config.json"])["hidden_act"] == "relu"
    assert {"tokenizer.json", "model.safetensors", "lambda_gelu.json"} <= set(files)
    assert 'from_pretrained("tester/tiny")' in files["README.md"].decode()
    assert f"{hub.url}/tester/tiny/commit/" in process.stdout


def macro_f1(pairs: list[tuple[str, str]]) -> float:
    names = sorted({name for pair in pairs for name in pair})
    hits = [sum(pair == (name, name) for pair in pairs) for name in names]
    found = [sum((a == name) + (b == name) for a, b in pairs) for name in names]
    return sum(2 * hit / total for hit, total in zip(hits, found, strict=True)) / len(names)


@pytest.mark.parametrize(("name", "sites", "steps"), [("text", 2, 24), ("image", 2, 16)])
def test_lambda_gelu_run(runs: dict[str, tuple[Path, dict[str, Any], list[str]]], name: str, sites: int, steps: int) -> None:
    """The reported accuracy and F1 are counted again from what stock transformers predicts, without the package."""
    output, results, answers = runs[name]
    pairs = [tuple(answer.split()) for answer in answers]
    final = results["metrics"]["after substitution"]
    assert final["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert final["f1_macro"] == pytest.approx(macro_f1(pairs))
    # it has learned, and not everything, so that the comparison above can fail
    assert 1.2 * max(sum(b == n for _, b in pairs) for n in {b for _, b in pairs}) / len(pairs) < final["accuracy"] < 1.0
    trained = results["metrics"]["after training"]
    assert {key: trained[f"relu_{key}"] for key in ("loss", "accuracy", "f1_macro")} == pytest.approx(final)

    assert results["activation"] == "lambda_gelu"
    assert results["stock_difference"] <= 1e-6
    assert (results["steps"], results["seed"]) == (steps, 5)
    assert results["seconds"] > 0
    assert set(results["versions"]) == {"python", "hf_lambda_gelu", "transformers", "torch"}
    # the learned λ are those that the log has where the ramp begins, or a step before the jump; the last ones the target
    log = [entry for entry in state_of(output)["log_history"] if "loss" in entry]
    step, slack = (3 * steps // 4 - 1, 0.015) if name == "text" else (steps // 4, 1e-6)
    profile = {key.removeprefix("hardness/"): value for key, value in log[step - 1].items() if "hardness/" in key}
    assert results["learned_hardness"] == pytest.approx(profile, abs=slack)
    assert max(profile.values()) < 2.0
    assert len(profile) == sites
    assert any(value > 1.001 for value in profile.values())
    assert [value for key, value in log[-1].items() if "hardness/" in key] == pytest.approx([159.577] * sites, abs=1e-2)

    assert (output / "hardness.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((output / "relu" / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    with safe_open(output / "relu" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "hardness" in key]  # noqa: SIM118
    assert (output / "relu" / "README.md").is_file()
    names = NAMES if name == "text" else ["above", "below"]
    assert config["id2label"] == {str(index): each for index, each in enumerate(names)}


def test_stock_run_from_json_and_the_price_of_the_naive_swap(tmp_path: Path, model: Path) -> None:
    """The stages against stock BERTs: the last checkpoint with gelu and with relu in the config, and the saved folder."""
    rows = {name: text_rows(count, seed) for name, count, seed in (("train", 48, 0), ("test", 32, 1))}
    for name in rows:
        lines = [json.dumps({"text": r["first"], "score": NAMES.index(r["label"]) - 1}) for r in rows[name]]
        (tmp_path / f"{name}.json").write_text("\n".join(lines))
    files = f"--train_file {tmp_path}/train.json --validation_file {tmp_path}/test.json --label_column score"
    results = run("finetune_text", model, tmp_path / "out", f"--activation stock {files}")
    assert list(results["metrics"]) == ["after training", "ReLU swapped in, unprepared", "ReLU, not trained further"]
    assert "learned_hardness" not in results
    assert [site["method"] for site in results["compensation"]["sites"]] == ["least_squares"] * 2
    assert results["stock_difference"] <= 1e-6
    values = {}
    sources = (("checkpoint-24", "gelu"), ("checkpoint-24", "relu"), ("relu", None))
    for (folder, activation), stage in zip(sources, results["metrics"], strict=True):
        values[stage] = evaluated(tmp_path / "out" / folder, activation, rows["test"], ["-1", "0", "1"])
        assert results["metrics"][stage]["loss"] == pytest.approx(values[stage][0], rel=1e-5)
        assert results["metrics"][stage]["accuracy"] == pytest.approx(values[stage][1])
    first, second, third = values.values()
    assert abs(first[0] - second[0]) > 1e-4 * first[0]
    assert abs(second[0] - third[0]) > 1e-5 * first[0]


@pytest.mark.parametrize("compensate", ["none", "bias", "least_squares"])
def test_relu_run_from_a_folder(tmp_path: Path, model: Path, compensate: str) -> None:
    """A folder with train and test files; the checkpoint is a stock ReLU model, its accuracy on the rows asked for."""
    test = text_rows(30, 1)
    renamed = [{"sentence": r["first"], "label": r["label"]} for r in text_rows(60, 0)]
    write_csv(tmp_path / "data" / "train.csv", renamed)
    write_csv(tmp_path / "data" / "test.csv", [{"sentence": r["first"], "label": r["label"]} for r in test])
    options = f"--activation relu --compensate {compensate} --dataset_name {tmp_path / 'data'} --text_column sentence"
    results = run("finetune_text", model, tmp_path / "out", f"{options} --max_train_samples 40 --max_eval_samples 16")
    assert list(results["metrics"]) == ["after training"]
    refit = [site["method"] for site in results.get("compensation", {}).get("sites", [])]
    assert refit == ([] if compensate == "none" else [compensate] * 2)
    assert results["steps"] == 4 * 5
    checkpoint = tmp_path / "out" / "checkpoint-20"
    assert json.loads((checkpoint / "config.json").read_text())["hidden_act"] == "relu"
    loss, accuracy = evaluated(checkpoint, None, test[:16], NAMES)
    assert results["metrics"]["after training"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert results["metrics"]["after training"]["accuracy"] == pytest.approx(accuracy)


@torch.no_grad()
def evaluated(folder: Path, activation: str | None, rows: list[dict[str, str]], names: list[str]) -> tuple[float, float]:
    """Loss and accuracy by a stock BERT, row by row."""
    changes = {"hidden_act": activation} if activation else {}
    bert = BertForSequenceClassification.from_pretrained(folder, **changes).eval()
    assert [bert.config.id2label[index] for index in range(3)] == names
    tokenizer = BertTokenizer.from_pretrained(folder)
    logits = torch.cat([bert(**tokenizer(row["first"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([NAMES.index(row["label"]) for row in rows])
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean())


def test_activations_are_compared_on_equal_terms(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same head and the same batches: at λ = 1 the first losses of a λ-GELU run are those of a stock run."""
    monkeypatch.setattr(hlg, "verify_relu_pretrained", lambda *_, **__: 0.0)  # not the matter here, and slow
    write_csv(tmp_path / "data" / "train.csv", text_rows(24, 0))
    write_csv(tmp_path / "data" / "validation.csv", text_rows(6, 1))
    losses = {}
    for activation in ("lambda_gelu", "stock"):
        options = f"--activation {activation} --dataset_name {tmp_path / 'data'} --text_column first --max_steps 3"
        options += " --hardness_learning_rate 0 --hardness_switch_point 1 --hardness_hold 0"
        run("finetune_text", model, tmp_path / activation, options)
        losses[activation] = [e["loss"] for e in state_of(tmp_path / activation)["log_history"] if "loss" in e]
    assert len(losses["stock"]) == 3
    assert losses["lambda_gelu"] == pytest.approx(losses["stock"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ("", ValueError, "no data: give --dataset_name, or --train_file and --validation_file"),
        ("--train_file missing.csv", FileNotFoundError, r"missing\.csv"),
        ("--train_file train.tsv --validation_file train.tsv", ValueError, r"tsv.*csv, json or parquet"),
        ("--dataset_name nowhere/folder/at/all", FileNotFoundError, "nowhere/folder/at/all"),
        ("--train_file train.csv", ValueError, r"one of \['validation', 'test'\], found \['train'\].*--validation_split"),
        (
            "--dataset_name data --train_split training",
            ValueError,
            r"split 'training' .*found \['train', 'test'\].*--train_sp",
        ),
        ("--dataset_name data --validation_split dev", ValueError, r"one of \['dev'\], found \['train', 'test'\]"),
        ("--dataset_name data", ValueError, r"no column 'text' in \['first', 'second', 'label'\].*--text_column"),
        (
            "--dataset_name data --text_column first --text_pair_column third",
            ValueError,
            r"no column 'third' in \['first', 'second', 'label'\].*--text_pair_column",
        ),
        ("--dataset_name data --text_column first --label_column y", ValueError, r"no column 'y' in .*--label_column"),
    ],
)
def test_errors_of_the_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    error: type[Exception],
    expected: str,
) -> None:
    """What was got, what is there, and the option that mends it; before a model is even looked for."""
    monkeypatch.chdir(tmp_path)
    for path in ("train.csv", "train.tsv", "data/train.csv", "data/test.csv"):
        write_csv(tmp_path / path, text_rows(6, 0))
    with pytest.raises(error, match=expected):
        run("finetune_text", tmp_path / "no-model", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_error_for_the_image_column(tmp_path: Path) -> None:
    """Names the columns that there are."""
    pictures = write_images(tmp_path / "pictures")
    options = f"--dataset_name {pictures} --image_column picture"
    with pytest.raises(ValueError, match=r"no column 'picture' in \['image', 'label'\].*--image_column"):
        run("finetune_image", tmp_path / "no-model", tmp_path / "out", options)


@pytest.mark.parametrize("script", ["finetune_text", "finetune_image"])
def test_help_shows_the_hardness_arguments(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the choices, the defaults and the three activations."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{script}").main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("learning_rate", "switch_point", "compensate", "ramp", "tolerance", "hold"):
        assert f"--hardness_{name}" in shown
    for text in ("{lambda_gelu,stock,relu}", "{geometric,linear,cosine,reciprocal}", "--eval_relu", "(default: 0.75)"):
        assert text in shown
