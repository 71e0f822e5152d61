"""Damages folders of checkpoints in every way that comes to mind, and looks that nothing but a CheckpointError comes out.

    python -m scripts.tools.damage                 # 5,000 damaged folders, an hour of one core; a table of what came out
    python -m scripts.tools.damage --inputs 200 --seed 7

Each input is one or two edits (a value of another type, a key that is gone, a file cut off or garbled, a tensor renamed …)
of the folder of a tiny BERT, Llama or T5, of a λ-GELU one or in shards. The verbs that read folders then either refuse by a
CheckpointError, or another of their documented errors, and make nothing; or succeed, and what they made loads.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.utils import logging

import hf_lambda_gelu as hlg
from hf_lambda_gelu.structure.loading import load_saved

from .tables import append

RESULTS = Path(__file__).parent / "results" / "damage.csv"
FIELDS = ["verb", "edit", "inputs", "refused", "made"]
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
REFUSALS = (hlg.CheckpointError, hlg.ConversionError, hlg.SoftGateError)
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 10**9, 10**30, 0.5, -1e30, math.nan, math.inf, "", "x", "relu", "../../etc/passwd",
    [], [1], [[]], {}, {"a": 1}, [None], "\ud800", "lambda_gelu",
]  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """One damage: its kind, the file's place in the order of names, and what to draw values from."""

    kind: str
    where: int
    what: int


def folders(root: Path) -> dict[str, Path]:
    """The folders that are damaged, made once."""
    torch.manual_seed(0)
    bert, llama = BertForSequenceClassification(BertConfig(**SMALL)), LlamaForCausalLM(LlamaConfig(**SMALL))
    t5 = T5(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"))
    bert.save_pretrained(root / "bert")
    llama.save_pretrained(root / "llama", max_shard_size="5KB")
    t5.save_pretrained(root / "t5")
    for name, model in (("bert-λ", bert), ("llama-λ", llama)):
        hlg.convert(model, init_hardness=300.0)
        model.save_pretrained(root / name, max_shard_size="5KB" if "llama" in name else "1GB")
    (root / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return {path.name: path for path in sorted(root.iterdir())}


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *_paths(inner, (*path, key)))]


def _json(file: Path, edit: Edit) -> None:
    """Another value at one place, or none."""
    found = json.loads(file.read_text())
    places = _paths(found)
    path = places[edit.where % len(places)]
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if edit.kind == "a key is gone" and isinstance(inner, dict):
        del inner[path[-1]]
    elif edit.kind == "a key is another" and isinstance(inner, dict):
        inner[str(path[-1]) + "s"] = inner.pop(path[-1])
    else:
        inner[path[-1]] = copy.deepcopy(VALUES[edit.what % len(VALUES)])
    file.write_text(json.dumps(found), encoding="utf-8", errors="surrogatepass")


def _bytes(file: Path, edit: Edit) -> None:
    """Cut off, emptied, garbled, or something else altogether."""
    data = bytearray(file.read_bytes())
    at = (edit.where * 977) % max(1, len(data))
    if edit.kind == "cut off":
        data = data[:at]
    elif edit.kind == "a byte":
        data[at % min(len(data), 400)] ^= 1 << edit.what % 8  # mostly in the header
    else:
        other = [b"", b"null", b"[]", b"\xff\xfe\x00", b"[" * 5000, b"{}", b'"text"', b"\x80\x04.", b"1" * 5000]
        data = bytearray(other[edit.what % len(other)])
    file.write_bytes(data)


def _tensors(file: Path, edit: Edit) -> None:
    """Another tensor under a name, another name, or none."""
    tensors = load_file(file)
    name = sorted(tensors)[edit.where % len(tensors)]
    tensor = tensors.pop(name)
    changed = [
        tensor.flatten()[:1], tensor[None], tensor.to(torch.int64), tensor.to(torch.float8_e4m3fn), tensor * math.nan,
        torch.full_like(tensor, 1e38), torch.zeros(0), tensor.double(), torch.full_like(tensor, -5.0),
    ]  # fmt: skip
    if edit.kind == "a tensor is another":
        tensors[name] = changed[edit.what % len(changed)]
    elif edit.kind == "a tensor has another name":
        tensors[name + ".weight"] = tensor
    save_file(tensors, file, {"format": "pt"})


def _file(file: Path, edit: Edit) -> None:
    """Gone, a folder, a link to nothing, or to itself."""
    file.unlink()
    other = [lambda: None, file.mkdir, lambda: file.symlink_to("gone"), lambda: file.symlink_to(file.name)]
    other[edit.what % len(other)]()


KINDS: dict[str, tuple[Callable[[Path, Edit], None], str]] = {
    "a value is another": (_json, ".json"),
    "a key is gone": (_json, ".json"),
    "a key is another": (_json, ".json"),
    "cut off": (_bytes, ""),
    "a byte": (_bytes, ""),
    "another content": (_bytes, ""),
    "a tensor is another": (_tensors, ".safetensors"),
    "a tensor has another name": (_tensors, ".safetensors"),
    "a tensor is gone": (_tensors, ".safetensors"),
    "another kind of file": (_file, ""),
}
VERBS = ("convert_checkpoint", "relu_ize_checkpoint", "load")


@dataclass(frozen=True)
class Input:
    """What a verb is given."""

    verb: str
    folder: str
    edits: tuple[Edit, ...]


def draw(number: int, names: list[str]) -> Input:
    """An input for each number: evenly over verbs and kinds, which a search that varies what it had before is not."""
    rng = random.Random(number)
    verb = rng.choice(VERBS)
    folder = rng.choice([name for name in names if verb != "relu_ize_checkpoint" or "λ" in name])
    kinds = sorted(KINDS)
    edits = (Edit(rng.choice(kinds), rng.randrange(1000), rng.randrange(1000)) for _ in range(rng.choice((1, 1, 2))))
    return Input(verb, folder, tuple(edits))


def damage(folder: Path, edits: Sequence[Edit]) -> None:
    """Makes the edits, as far as the ones before left something to edit."""
    for edit in edits:
        change, suffix = KINDS[edit.kind]
        files = sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and path.is_file())
        with contextlib.suppress(Exception if len(edits) > 1 else ZeroDivisionError):  # a second may find nothing to edit
            change(files[edit.where % len(files)], edit)


def verdict(verb: str, folder: Path, target: Path) -> str:
    """ "refused" or "made".

    Raises:
        AssertionError: it was refused and something was made, or what was made does not load.
    """
    verbs: dict[str, Callable[[], object]] = {
        "convert_checkpoint": lambda: hlg.convert_checkpoint(folder, target),
        "relu_ize_checkpoint": lambda: hlg.relu_ize_checkpoint(folder, target, force=True),
        "load": lambda: load_saved(folder),
    }
    before = {path.name for path in target.parent.iterdir()}
    try:
        verbs[verb]()
    except ValueError as error:
        known = isinstance(error, REFUSALS) or (type(error) is ValueError and "λ" in str(error))
        if not known:  # a checkpoint without λ, or with one that is none, is an error of its own
            raise
        if {path.name for path in target.parent.iterdir()} != before:
            raise AssertionError("refused, and something was made") from error
        return "refused"
    if verb != "load":
        load_saved(target)
    return "made"


def tried(drawn: Input, made: Mapping[str, Path], root: Path) -> str:
    """The verdict on an input."""
    with tempfile.TemporaryDirectory(dir=root) as place:
        shutil.copytree(made[drawn.folder], Path(place, "src"))
        damage(Path(place, "src"), drawn.edits)
        return verdict(drawn.verb, Path(place, "src"), Path(place, "dst"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tools.damage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as root:
        made = folders(Path(root, "whole"))

        @settings(
            max_examples=arguments.inputs, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(st.integers(0, 2**60))
        def hold(number: int) -> None:
            drawn = draw(number + arguments.seed, sorted(made))
            note(drawn)
            counts[drawn.verb, drawn.edits[0].kind, tried(drawn, made, Path(root))] += 1

        hold()
    arguments.out.unlink(missing_ok=True)
    for verb, kind in sorted({key[:2] for key in counts}):
        refused, whole = counts[verb, kind, "refused"], counts[verb, kind, "made"]
        row = {"verb": verb, "edit": kind, "inputs": refused + whole, "refused": refused, "made": whole}
        append(arguments.out, FIELDS, [row])
        print(row)


if __name__ == "__main__":
    main()
