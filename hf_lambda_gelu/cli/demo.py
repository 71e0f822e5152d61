"""`demo`: the whole way, from a smooth network to a ReLU checkpoint in stock transformers, offline and in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .data import Batches, Data, Examples, batches, examples
from .models import loaded, processors, resolved
from .work import working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SUBJECTS = ("the film", "this plot", "her second novel", "the old camera", "a long concert", "their new kitchen")
_VERBS = ("is", "was never", "seems", "will soon be", "looks")
_WORDS = ("good", "slow and dull", "a small wonder", "worth every minute", "too loud", "as bright as ever", "badly made")
SENTENCES = tuple(f"{s} {v} {w}" for s in _SUBJECTS for v in _VERBS for w in _WORDS)


def demo(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or Hub name; by default a tiny random BERT.")
    ] = None,
    calibration: o.Calibration = None,
    column: o.Column = None,
    split: o.Split = "train",
    samples: o.Samples = 200,
    save_to: Annotated[Path | None, typer.Option(help="Folder to keep the ReLU checkpoint in.")] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Go the whole way on a tiny model, in seconds.

    Convert, swap in ReLU unprepared, refit, save, verify in stock transformers. Without arguments everything is made on the
    spot: a tiny BERT with random weights, and sentences. Half of the sentences are for the refit; how much the outputs
    change is measured on the other half.

    \b
    Examples:
      hf-lambda-gelu demo
      hf-lambda-gelu demo distilbert/distilbert-base-uncased --save-to distilbert-relu
    """
    with working(json, debug) as result:
        from .inner import scratch_folder

        if save_to is not None:
            from .transform import check_target_folder

            check_target_folder(save_to)
        with scratch_folder() as scratch:
            data = Data(calibration, column, None, split, None, samples, 32, 64)
            found = examples(data) if calibration else Examples("text", SENTENCES[: min(samples, len(SENTENCES))])
            folder = tiny(scratch / "tiny") if model is None else resolved(model)
            network = loaded(folder, trust_remote_code)
            fed = batches(found, data, network, folder, trust_remote_code)
            carried = processors(folder, trust_remote_code)
            value = way(network, fed, save_to or scratch / "relu", carried, trust_remote_code)
        value["folder"] = None if save_to is None else str(save_to)
        result.set(value, shown(value))


def way(
    model: PreTrainedModel, fed: Batches, target: Path, carried: list[Any], trust_remote_code: bool = False
) -> dict[str, Any]:
    """Take the model to ReLU, step by step; what each step changed."""
    import hf_lambda_gelu as hlg

    from .outputs import change, outputs

    halves = [Examples(fed.found.kind, fed.found.items[start::2]) for start in (0, 1)]
    learned, held_out = (Batches(half, fed.size, fed.collate, fed._label) for half in halves)
    before = outputs(model, held_out)
    steps = []

    def step(name: str) -> None:
        moved = change(before, outputs(model, held_out))
        steps.append({"step": name, "activations": hlg.audit(model).counts, "change": moved})

    step("as it was")
    if not hlg.hardness_sites(model):
        hlg.convert(model)
    step("converted to λ-GELU")
    with hlg.gates_as_relu(model):
        step("ReLU swapped in, unprepared")
    hlg.relu_ize(model, calibration=learned, compensate="least_squares")
    step("ReLU, the maps after it refit")
    hlg.save_relu_pretrained(model, target, processor=carried, trust_remote_code=trust_remote_code)
    return {
        "model": type(model).__name__,
        "examples": {"refit": len(halves[0].items), "held_out": len(halves[1].items)},
        "steps": steps,
        "stock_difference": hlg.verify_relu_pretrained(model, target, trust_remote_code=trust_remote_code),
    }


def shown(value: dict[str, Any]) -> str:
    """The table."""
    counts = value["examples"]
    lines = [f"{value['model']}: {counts['refit']} examples for the refit, {counts['held_out']} others to measure on", ""]
    lines.append(f"  {'step':<30}  {'outputs changed':>15}  activations that ran")
    for step in value["steps"]:
        ran = ", ".join(f"{count} {kind}" for kind, count in step["activations"].items())
        lines.append(f"  {step['step']:<30}  {step['change']:>15.2%}  {ran}")
    moved = value["stock_difference"]
    lines += ["", f"saved, and loaded by stock transformers without this package: outputs differ by {moved:g}"]
    if value["folder"]:
        lines.append(f"the ReLU checkpoint is in {value['folder']!r}")
    return "\n".join(lines)


def tiny(folder: Path) -> Path:
    """A BERT of two layers with random weights, large enough for the activations to matter, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.25,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder
