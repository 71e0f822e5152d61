"""README.md as a stranger reads it: its lines run as they stand, and what it names is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiny
from support.hub_server import HubServer
from support.processes import in_fork
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
MODEL = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
# the only thing that is put before the README's lines: the command of this copy of the package, installed or not
COMMAND = 'hf-lambda-gelu() { "$PYTHON" -m hf_lambda_gelu.cli "$@"; }\nset -e\n'


def block(start: str) -> str:
    """The one block of README.md that begins so, after its fence."""
    (found,) = [code for language, code in BLOCKS if f"{language}\n{code}".startswith(start)]
    return found


def classifier(folder: Path) -> Path:
    """A tiny DistilBERT with a tokenizer that knows the words of README's example."""
    words = sorted(set(re.findall(r"[a-z]+", block("python\n").lower())))
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", *words])}
    config = tiny.build("distilbert", vocab_size=len(vocabulary)).config
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path, texts: list[str], **changes: str) -> torch.Tensor:
    """What stock transformers computes from the folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **changes).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, HubServer]]:
    """README's Python and its command line, pasted in this order by someone whose name on the Hub is `you`."""
    source, here = classifier(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("here")
    with HubServer(token="hf_test", user="you") as hub:
        hub.add_repo(MODEL, {file.name: file.read_bytes() for file in source.iterdir()})
        environment = hub.env(tmp_path_factory.mktemp("home")) | {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = in_fork(block("python\n"), cwd=here, env=environment)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        command = ["bash", "-c", COMMAND + block("\nhf-lambda-gelu")]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        yield source, here, hub


@pytest.mark.parametrize("folder", ["sst2-relu", "sst2-relu-2"])
def test_relu_networks(pasted: tuple[Path, Path, HubServer], folder: str) -> None:
    """Stock transformers has a ReLU network in the folder, and it is nearer to the GELU network than ReLU swapped in."""
    source, here, _ = pasted
    texts = (here / "reviews.txt").read_text(encoding="utf-8").splitlines()[5::40]
    smooth = logits(source, texts)
    change, swap = (
        (other - smooth).norm() for other in (logits(here / folder, texts), logits(source, texts, activation="relu"))
    )
    assert '"activation": "relu"' in (here / folder / "config.json").read_text(encoding="utf-8")
    assert 0 < change < 0.5 * swap


def test_published(pasted: tuple[Path, Path, HubServer]) -> None:
    """What is on the Hub is the folder, byte for byte, in one commit."""
    _, here, hub = pasted
    repository = hub.repos["you/sst2-relu"]
    assert len(repository.commits) == 1
    sent = {file.name: file.read_bytes() for file in (here / "sst2-relu-2").iterdir() if file.name != "README.md"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "lambda_gelu.json"} <= sent.keys()
    assert {name: repository.files.get(name) for name in sent} == sent


def test_three_screens() -> None:
    assert len(README.splitlines()) <= 158  # with the tables of make downstream and of hinges
    assert max(map(len, README.splitlines())) < 200


def test_links() -> None:
    """Files, and headings in them, that the README leads to."""
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 20
    for target in (link for link in links if "://" not in link):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page: Path) -> None:
    """Make targets, scripts and files of the package and its tests that a page names."""
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    code = "\n".join(re.findall(r"`+([^`]+)`+", text))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= set(targets)
    for module in re.findall(r"-m (scripts\.[\w.]+)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    rooms = "|".join(room.name for room in (ROOT / "hf_lambda_gelu").iterdir() if (room / "__init__.py").is_file())
    for path in re.findall(rf"\b((?:hf_lambda_gelu|scripts|tests|{rooms})/[\w/]+\.\w+)", text):
        assert (ROOT / path).is_file() or (ROOT / "hf_lambda_gelu" / path).is_file(), path
