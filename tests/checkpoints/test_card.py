"""The model card of a saved ReLU model: what huggingface_hub reads out of it, and how it looks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from support import tiny
from support.models import relu_model
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import card_record, render_card
from hf_lambda_gelu.structure.smooth_activations import Unconverted

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


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        (
            "llama",
            "of a llama checkpoint llama.cpp runs SiLU whatever the config says (relu), and vLLM's own llama takes SiLU",
        ),
        ("bert", "of a bert checkpoint llama.cpp runs GELU whatever the config says (relu): it does not run this network"),
        ("gpt2", "of a gpt2 checkpoint llama.cpp runs GELU whatever the config says (relu): it does not run this network"),
        ("vit", None),
    ],
)
def test_runtimes_that_ignore_the_activation(name: str, warned: str | None, tmp_path: Path) -> None:
    folder = hlg.save_relu_pretrained(relu_model(name, 300.0), tmp_path / "model")
    text = ModelCard.load(folder / "README.md").text
    assert ("Not every runtime runs it" in text) == (warned is not None)
    assert warned is None or f"\n\n**Not every runtime runs it:** {warned}" in text


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


HOSTILE = "a<script>alert(1)</script> [b](http://evil) ![c](http://evil/i.png) `d` ``` **e** | f &lt;\n# g\n```\n<img src=x>"


def html(card: ModelCard) -> str:
    """The page, by a reader of Markdown that lets HTML through."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text))


def tags(card: ModelCard) -> list[str]:
    """Its elements, in order."""
    return re.findall(r"</?[a-z0-9]+", html(card))


def test_text_of_a_user_is_shown_and_not_obeyed() -> None:
    """In each field, as a reader of Markdown with HTML makes a page of it: no element that is the text's own."""
    details = hlg.CardDetails(
        base_model=HOSTILE,
        dataset=HOSTILE,
        results={HOSTILE: {HOSTILE: 0.5}},
        final=HOSTILE,
        command=HOSTILE,
        arguments={HOSTILE: HOSTILE},
    )
    left = [Unconverted(HOSTILE, HOSTILE, "")]
    record = card_record(HOSTILE, "BertModel", details, None, left, None, {"torch": "2"})
    card = render_card(record)
    page = html(card)
    harmless = {"results": {"r": {"m": 0.5}}, "final": "r", "command": "c", "arguments": {"a": "v"}}
    alike = hlg.CardDetails(base_model="b", dataset="d", **harmless)
    twin = render_card(card_record("n", "BertModel", alike, None, [Unconverted("x", "y", "")], None, {"torch": "2"}))
    assert tags(card) == tags(twin)
    assert page.count("http://evil") > 8
    assert "alert(1)" in page
