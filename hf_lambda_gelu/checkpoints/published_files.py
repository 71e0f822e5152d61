"""Which files of a saved folder go to the Hub: an allow-list, which no link leads out of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..structure.own_code import code_files, references
from .card import CARD_FILES, REPORT_NAME
from .folders import of_the_cache
from .redaction import holds_hub_token

_CARD = "README.md"
_MODEL = ("config.json", "generation_config.json", "recipe.yaml")  # the last is llm-compressor's
_PROCESSOR_CONFIGS = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# vocabularies of transformers' tokenizers; what others of its classes name is looked up
_VOCABULARIES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
)
_PROCESSOR_FOLDERS = ("tokenizer", "image_processor", "feature_extractor")  # ends of names, such as qformer_tokenizer
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class PublishedFiles:
    """What is uploaded of a folder, and what is not.

    Attributes:
        names: paths within the folder, with /, in order.
        left_out: path within the folder → why it stays; all that is in a folder that stays counts as the folder.
    """

    names: list[str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """What stays, for a person."""
        return ", ".join(f"{name} ({reason})" for name, reason in self.left_out.items())


def published_files(folder: Path, trust_remote_code: bool = False) -> PublishedFiles:
    """The files of `folder` that a model's own save, its processor's and this package write; links are not followed.

    Links into the Hub's own cache, which its snapshots are made of, count as files. Of Python files, with trust alone, those
    that loading the model would run.

    Raises:
        ValueError: the config, weights or code are missing or lie behind a link, or the card holds a token of the Hub.
    """
    found = listed_files(folder, trust_remote_code)
    _check_complete(folder, found.names, found.left_out)
    if trust_remote_code:
        _check_code(folder, found)
    return found


def listed_files(folder: Path, trust_remote_code: bool = False) -> PublishedFiles:
    """As `published_files`, whether they make a model or not."""
    all_code = set(code_files(folder))
    code = all_code if trust_remote_code else set()
    allowed = {*_MODEL, *CARD_FILES, *_weights(folder), *_processor_files(folder), *code}
    names: list[str] = []
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and (path.name == _TEMPLATES or path.name.endswith(_PROCESSOR_FOLDERS)):
            of_processor = _processor_files(path)
            for inner in sorted(path.iterdir()):
                is_known = inner.suffix == ".jinja" if path.name == _TEMPLATES else inner.name in of_processor
                _sort(f"{path.name}/{inner.name}", inner, is_known, names, left_out)
        elif path.is_dir() and not path.is_symlink() and any(name.startswith(f"{path.name}/") for name in code):
            for inner in sorted(path.iterdir()):
                _sort(f"{path.name}/{inner.name}", inner, f"{path.name}/{inner.name}" in code, names, left_out)
        else:
            name = path.name + ("/" if path.is_dir() and not path.is_symlink() else "")
            _sort(name, path, name in allowed, names, left_out)
    for name in all_code - code:
        left_out.update({name: "code, which goes up with trust_remote_code=True alone"} if name in left_out else {})
    return PublishedFiles(names, left_out)


def _check_code(folder: Path, found: PublishedFiles) -> None:
    """ValueError unless all code that loading would run goes up."""
    named = {f"{reference.module}.py": f"which {reference.file} names" for reference in references(folder)}
    for name, why in {**dict.fromkeys(code_files(folder), "which other code imports"), **named}.items():
        if name not in found.names:
            raise ValueError(
                f"{str(folder)!r} cannot be published: {name}, {why}, is {found.left_out.get(name, 'missing')}. Save the "
                "model anew by save_relu_pretrained(model, folder)"
            )


def _sort(name: str, path: Path, is_known: bool, names: list[str], left_out: dict[str, str]) -> None:
    if path.is_symlink() and not of_the_cache(path):
        left_out[name] = "a link"
    elif not is_known:
        left_out[name] = "not a file of the model, its processor or this package"
    elif not path.is_file():
        left_out[name] = "no regular file"
    else:
        names.append(name)


def _weights(folder: Path) -> set[str]:
    """The safetensors that transformers would load: one file, or an index and the files of the folder that it names."""
    if os.path.lexists(folder / SAFE_WEIGHTS_NAME):
        return {SAFE_WEIGHTS_NAME}
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_symlink() and not of_the_cache(index):
        return set()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    plain = {s for s in shards if isinstance(s, str) and s == os.path.basename(s) and s.endswith(".safetensors")}
    return {SAFE_WEIGHTS_INDEX_NAME, *plain} if plain == shards else set()


def _processor_files(folder: Path) -> set[str]:
    """Names that tokenizers and processors write, those of this folder's tokenizer class among them."""
    names = {*_PROCESSOR_CONFIGS, *_VOCABULARIES}
    config = folder / "tokenizer_config.json"
    if config.is_symlink() and not of_the_cache(config):
        return names
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["tokenizer_class"]
        own = getattr(transformers, name).vocab_files_names.values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return names
    return names | {file for file in own if isinstance(file, str)}


def _check_complete(folder: Path, names: list[str], left_out: dict[str, str]) -> None:
    for needed in ("config.json", SAFE_WEIGHTS_NAME):
        found = needed in names or (needed == SAFE_WEIGHTS_NAME and SAFE_WEIGHTS_INDEX_NAME in names)
        if not found:
            why = f"{needed} is {left_out[needed]}" if needed in left_out else f"it holds no {needed}"
            raise ValueError(
                f"{str(folder)!r} cannot be published: {why}. Save the model anew by save_relu_pretrained(model, folder)"
            )
    if SAFE_WEIGHTS_INDEX_NAME in names and (missing := sorted(_weights(folder) - set(names))):
        why = left_out.get(missing[0], "missing")
        raise ValueError(f"{str(folder)!r} cannot be published: {missing[0]}, which its index names, is {why}")
    for name in {_CARD, REPORT_NAME} & set(names):
        if holds_hub_token((folder / name).read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"{str(folder / name)!r} holds a token of the Hub: take it out, and revoke it on the Hub")
