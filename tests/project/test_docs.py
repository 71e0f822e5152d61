"""The pages of docs/: every public name is on one, and their Python runs, with tiny models and a Hub on loopback."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from datasets import Dataset
from PIL import Image
from support import tiny
from support.hub_server import HubServer
from support.processes import in_child
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

import hf_lambda_gelu as hlg
from hf_lambda_gelu.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^(?P<mark><!-- not run: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = 0  # blocks marked `<!-- not run: reason -->`; each one more is a promise that nobody checks

WORDS = "a quiet two hours film that stays felt like four long with you . , < unk >"
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "</s>", *WORDS.split(" ")]
TEXTS = ["a quiet film that stays with you", "two hours that felt like four", "a long film", "four quiet hours with you"]


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def code(page: Path) -> Iterator[str]:
    """The page's blocks that run, each padded so that a traceback has the page's own line numbers."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if not match["mark"]:
            yield "\n" * text.count("\n", 0, match.start("code")) + match["code"]


# ------------------------------------------------------------------------------------------------ what is on the pages


def undocumented(texts: list[str]) -> set[str]:
    """Public names that no page renders (`::: hf_lambda_gelu.name`), or renders with no example beneath that uses them."""
    found = set()
    for text in texts:
        for section in re.split(r"^::: hf_lambda_gelu\.", text, flags=re.MULTILINE)[1:]:
            name = section.split(maxsplit=1)[0]
            examples = "".join(match["code"] for match in BLOCK.finditer(section))
            used = {node.attr for node in ast.walk(ast.parse(examples)) if isinstance(node, ast.Attribute)}
            # what is never called by its name, a report, has an example in which something is done with it
            if name in used or (examples and name.endswith(("Report", "Statistics", "SiteSensitivity"))):
                found.add(name)
    return set(hlg.__all__) - found


def test_every_public_name_is_on_a_page() -> None:
    assert not undocumented([page.read_text(encoding="utf-8") for page in pages()])


@pytest.mark.parametrize("name", ["convert", "FoldReport"])
def test_a_missing_name_is_found(name: str) -> None:
    """Without the name's section, or without the example in it, the check above fails."""
    texts = [page.read_text(encoding="utf-8") for page in pages()]
    section = re.compile(rf"^::: hf_lambda_gelu\.{name}\n(?P<rest>.*?)(?=^:::|\Z)", re.MULTILINE | re.DOTALL)
    assert sum(len(section.findall(text)) for text in texts) == 1
    assert undocumented([section.sub("", text) for text in texts]) == {name}
    assert undocumented([section.sub(f"::: hf_lambda_gelu.{name}\n", text) for text in texts]) == {name}


def test_reference_lists_every_name() -> None:
    listed = re.findall(r"`(\w+)`", (DOCS / "reference" / "index.md").read_text(encoding="utf-8").partition("## Errors")[0])
    assert sorted(listed) == sorted(hlg.__all__)


def test_errors_are_what_the_reference_says() -> None:
    """Those that the sentence beneath the table names are ValueErrors, the others RuntimeErrors."""
    text = (DOCS / "reference" / "index.md").read_text(encoding="utf-8").partition("## Errors")[2]
    table, _, beneath = text.rpartition("|\n")
    sentence = beneath.partition("are `ValueError`s")[0]
    errors = re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)
    assert sorted(errors) == sorted(name for name in hlg.__all__ if name.endswith("Error") or name == "KernelUnavailable")
    for name in errors:
        assert issubclass(getattr(hlg, name), ValueError if f"`{name}`" in sentence else RuntimeError), name


def test_every_option_is_on_the_page_of_the_command_line() -> None:
    """In the row of its command, or among the options of the data where the row has these."""
    text = (DOCS / "how-to" / "command-line.md").read_text(encoding="utf-8").partition("## Arguments\n")[2]
    arguments, _, data = text.partition("## Data\n")
    of_data = {"--calibration", *re.findall(r"^\| `(--[\w-]+)` \|", data, re.MULTILINE)}
    commands = dict(typer.main.get_command(app).commands)
    commands["export onnx"] = commands.pop("export").commands["onnx"]
    for name, command in commands.items():
        (row,) = re.findall(rf"^\| `{name}(?: [A-Z[].*?)?` \| (.*) \|$", arguments, re.MULTILINE)
        said = set(re.findall(r"--[\w-]+", row)) | (of_data if "data options" in row else set())
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert options - {"--json", "--debug", "--help"} <= said, name


def test_blocks_that_do_not_run_are_counted() -> None:
    blocks = [match for page in pages() for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    assert sum(bool(match["mark"]) for match in blocks) == NOT_RUN
    fences = [line for page in pages() for line in page.read_text(encoding="utf-8").splitlines() if "```py" in line]
    assert len(blocks) == len(fences) > 50, "a block of Python in a form that this test does not see"


# -------------------------------------------------------------------------------------------- stand-ins for the Hub's


def model(folder: Path, kind: str, **overrides: int) -> None:
    tiny.build(kind, **overrides).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **tokens
    ).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def embedder(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model(folder / "words", "bert")
    words = Transformer(str(folder / "words"), max_seq_length=32)
    SentenceTransformer(modules=[words, Pooling(32)], device="cpu").save_pretrained(str(folder))


def reviews(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = {"text": [TEXTS[i % 4] for i in range(300 if split == "train" else 20)]}
        rows["label"] = [i % 2 for i in range(len(rows["text"]))]
        Dataset.from_dict(rows).to_json(folder / f"{split}.jsonl")


def images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(200)]
    Dataset.from_dict({"image": pictures, "label": [i % 10 for i in range(200)]}).to_parquet(folder / "train.parquet")


def wiki(folder: Path) -> None:
    Dataset.from_dict({"text": [TEXTS[i % 4] + " . " for i in range(3000)]}).to_json(folder / "train.jsonl")
    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    (folder / "README.md").write_text(card)


def smooth(folder: Path) -> None:
    built = tiny.build("bert-classifier")
    hlg.convert(built)
    tiny.set_hardness(built, 200.0)
    built.save_pretrained(folder)


# name on the pages → what makes the folder that takes its place
STAND_INS: dict[str, Callable[[Path], None]] = {
    "google-bert/bert-base-uncased": lambda folder: model(folder, "bert-classifier"),
    "textattack/bert-base-uncased-SST-2": lambda folder: model(folder, "bert-classifier"),
    "facebook/dinov2-small-imagenet1k-1-layer": lambda folder: model(folder, "dinov2"),
    "HuggingFaceTB/SmolLM2-135M": lambda folder: model(folder, "llama"),
    "google/flan-t5-small": lambda folder: model(folder, "t5", decoder_start_token_id=0, pad_token_id=0),
    "sentence-transformers/all-MiniLM-L6-v2": embedder,
    "cornell-movie-review-data/rotten_tomatoes": reviews,
    "zalando-datasets/fashion_mnist": images,
    "Salesforce/wikitext": wiki,
}
# folders that the pages take for granted
PRESENT: dict[str, Callable[[Path], None]] = {
    "models/bert": lambda folder: model(folder, "bert-classifier"),
    "runs/bert": smooth,
}
# what else is put in place of the page's: pattern → replacement
QUIET = "report_to='none', disable_tqdm=True, use_cpu=True, save_strategy='no'"
OTHER = {
    r'"you/': '"tester/',  # the stand-in Hub's user
    r"\b256\b": "16",  # tokens in a window: the tiny models have 64 positions
    r'(Arguments\(\s*"runs/[^"]*")': rf"\1, {QUIET}",  # training runs that print and keep nothing
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Text with the Hub's names replaced by folders, which are made when they are first needed."""
    made: dict[str, Path] = {}

    def replaced(text: str) -> str:
        for name, make in STAND_INS.items():
            if f'"{name}"' in text:
                if name not in made:
                    made[name] = tmp_path_factory.mktemp("hub") / name.rpartition("/")[2]
                    made[name].mkdir()
                    make(made[name])
                text = text.replace(f'"{name}"', repr(str(made[name])))
        for pattern, replacement in OTHER.items():
            text = re.sub(pattern, replacement, text)
        return text

    return replaced


@pytest.mark.parametrize("page", [page for page in pages() if any(code(page))], ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_run(page: Path, stand_in: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page run in order and share their names. Only what the table above names is put in place of the page's."""
    if "import oneshot" in page.read_text(encoding="utf-8"):
        pytest.importorskip("llmcompressor", reason="llm-compressor needs torch 2.10, and is not in the oldest set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("CI", "1")  # TRL's trainers send telemetry from elsewhere
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    text = page.read_text(encoding="utf-8")
    for folder, make in PRESENT.items():
        if f'checkpoint("{folder}"' in text:
            Path(folder).mkdir(parents=True)
            make(Path(folder))

    def run() -> None:
        namespace: dict[str, object] = {"__name__": page.stem}
        with HubServer(token="hf_test") as hub:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
            for block in code(page):
                exec(compile(stand_in(block), str(page.relative_to(ROOT)), "exec"), namespace)
        published = "push_relu_to_hub" in "".join(code(page))
        assert published == ("tester/bert-sst2-relu" in hub.repos), "what a page publishes is on the Hub"
        assert published == any(b'"hidden_act": "relu"' in repo.files["config.json"] for repo in hub.repos.values())

    if "init_process_group" in text:
        in_child(run)
    else:
        run()
