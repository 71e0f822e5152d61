"""Every architecture of the installed transformers: converted, substituted, folded, and reloaded without this package.

    python -m scripts.architectures.run                       # what is not in the CSV yet; with --jobs 2, under an hour
    python -m scripts.architectures.run --models bert llama   # these, and print them
    python -m scripts.architectures.run --heads               # all Auto classes of the most used architectures
    python -m scripts.architectures.run --table               # the summary of docs/coverage.md
    python -m scripts.architectures.run --compare old.csv     # what a new version of transformers changed

Models are tiny, with random weights (tiny_models.py); each is worked on in a process of its own, and reloaded in another one
that has never imported hf_lambda_gelu. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import transformers.trainer
from tqdm.auto import tqdm

from scripts.architectures import checks
from scripts.architectures.tiny_models import model_class, model_types
from scripts.tools.tables import read

RESULTS = Path(__file__).parent / "results" / "coverage.csv"
FIELDS = [
    "model_type",
    "auto",
    "class",
    "verdict",
    "sites",
    "left",
    "attributes",
    "convert",
    "hardened",
    "effect",
    "stock_reload",
    "relu_reload",
    "folded_reload",
    "fold_refused",
    "folded_hard_coded",
    "untold",
    "reason",
    "seconds",
    "transformers",
]
HEADS = [
    "MaskedLM",
    "CausalLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
    "NextSentencePrediction",
    "PreTraining",
    "ImageClassification",
    "SemanticSegmentation",
    "ObjectDetection",
    "MaskedImageModeling",
    "ZeroShotImageClassification",
    "AudioClassification",
    "CTC",
    "SpeechSeq2Seq",
    "AudioFrameClassification",
    "AudioXVector",
]
MOST_USED = [
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "electra",
    "deberta-v2",
    "mpnet",
    "xlm-roberta",
    "modernbert",
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen2",
    "t5",
    "bart",
    "whisper",
    "wav2vec2",
    "vit",
    "dinov2",
    "clip",
    "convnext",
    "swin",
]
LIMIT_SECONDS, LIMIT_BYTES = 180, 12 * 2**30
EXACT, ZERO = 1e-5, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.architectures.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="TYPE", help="model types; by default all")
    parser.add_argument("--heads", action="store_true", help="all Auto classes of the most used model types")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the summary of the results and do nothing else")
    parser.add_argument(
        "--compare", type=Path, metavar="CSV", help="print what differs from these results, and nothing else"
    )
    options = parser.parse_args()
    if options.table:
        print(table(read(options.results)))
    elif options.compare:
        print(compare(read(options.compare), read(options.results)))
    else:
        jobs = work(options.models or (MOST_USED if options.heads else model_types()), options.heads)
        if not options.models:
            done = {(row["model_type"], row["auto"]) for row in read(options.results)}
            jobs = [job for job in jobs if job not in done]
        run_all(jobs, options.jobs, options.results, verbose=bool(options.models))


def work(types: list[str], heads: bool) -> list[tuple[str, str]]:
    """(model type, Auto class) to go through."""
    autos = [f"AutoModelFor{head}" for head in HEADS if hasattr(transformers, f"AutoModelFor{head}")]
    if not heads:
        return [(name, "AutoModel") for name in types]
    return [(name, auto) for name in types for auto in autos if model_class(name, auto) is not None]


def run_all(jobs: list[tuple[str, str]], workers: int, results: Path, verbose: bool) -> None:
    """Each in a child of a child of this process, which itself never runs a model: forked processes start at once."""
    context = multiprocessing.get_context("fork")
    queue, running = list(reversed(jobs)), {}
    with tqdm(total=len(jobs), disable=None) as bar:
        while queue or running:
            while queue and len(running) < workers:
                ours, theirs = context.Pipe()
                process = context.Process(target=_one, args=(*queue.pop(), theirs))
                process.start()
                theirs.close()
                running[ours] = process
            for ours in wait(list(running)):
                row = ours.recv()
                running.pop(ours).join()
                append(results, row)
                bar.update()
                bar.set_postfix_str(row["model_type"])
                if verbose:
                    tqdm.write(str({key: value for key, value in row.items() if value != ""}))


def _one(model_type: str, auto: str, pipe: Connection) -> None:
    start = time.time()
    row: dict[str, Any] = {"model_type": model_type, "auto": auto}
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        for step in (checks.convert_and_save, checks.reload):
            row.update(_in_child(step, model_type, auto, Path(folder)))
            if "verdict" in row:
                break
    assert "hf_lambda_gelu" not in sys.modules
    if "verdict" not in row:
        row["verdict"] = verdict(row)
    row |= {"seconds": f"{time.time() - start:.1f}", "transformers": transformers.__version__}
    pipe.send({field: _text(row.get(field, "")) for field in FIELDS})


def _in_child(step: Callable[..., dict[str, Any]], model_type: str, auto: str, folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(step, model_type, auto, folder, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT_SECONDS) else {"verdict": "crash", "reason": f"over {LIMIT_SECONDS} s"}
    except EOFError:
        process.join()
        return {"verdict": "crash", "reason": f"{step.__name__} ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(step: Callable[..., dict[str, Any]], model_type: str, auto: str, folder: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        found = step(model_type, auto, folder)
    except Exception as error:
        found = {"verdict": "crash", "reason": f"{step.__name__}: {type(error).__name__}: {error}"}
    pipe.send(found)


def verdict(row: dict[str, Any]) -> str:
    """exact; or wrong. A model that stock transformers itself does not reload exactly is measured by what it makes of it."""
    if row["effect"] < 1e-6:
        return "not reached"  # converted, but the inputs do not come there, so that the reload proves nothing
    base = row.get("stock_reload", 0.0)
    if isinstance(base, str) or base > EXACT:
        return "stock reload differs"
    relu, folded = row.get("relu_reload"), row.get("folded_reload", 0.0)
    good = (
        row["convert"] <= EXACT
        and isinstance(relu, float)
        and relu <= max(ZERO, base)
        and isinstance(folded, float)
        and folded <= EXACT
        and "relu_keys" not in row
        and "folded_keys" not in row
        and not row.get("untold")
    )
    return "exact" if good else "wrong"


def table(rows: list[dict[str, str]]) -> str:
    """Counts by verdict, and what is not exact with its reason."""
    lines = []
    for heads in (False, True):
        chosen = [row for row in rows if (row["auto"] != "AutoModel") == heads]
        if not chosen:
            continue
        counts = Counter(row["verdict"] for row in chosen)
        title = "all Auto classes of the most used" if heads else "base models"
        lines += [
            f"**{title}** ({len(chosen)}, transformers {chosen[-1]['transformers']})",
            "",
            "| verdict | models |",
            "|---|---|",
        ]
        lines += [f"| {name} | {count} |" for name, count in counts.most_common()]
        exact = [row for row in chosen if row["verdict"] == "exact"]
        sites = sum(int(row["sites"]) for row in exact)
        folded = sum(row["folded_reload"] != "" for row in exact)
        lines += ["", f"Exact: {sites} sites; {folded} of {len(exact)} also folded, the others say why not.", ""]
        reasons: dict[str, list[str]] = {}
        for row in chosen:
            if row["verdict"] in ("refused", "wrong", "crash", "stock reload differs", "not reached"):
                reasons.setdefault(_why(row), []).append(
                    row["model_type"] if not heads else f"{row['model_type']} {row['class']}"
                )
        if reasons:
            lines += ["| not exact because | models |", "|---|---|"]
            lines += [f"| {why} | {', '.join(names)} |" for why, names in sorted(reasons.items())]
            lines.append("")
    return "\n".join(lines).rstrip()


_WHY = {
    "keeps its name": "refused: a module keeps the activation's name, for kernels that know few",
    "supports 'gelu'|Value must be one of|ValidationError": "refused: the config takes no ReLU",
    "KeyError": "refused: an activation table of its own",
    "Hardswish: none of the four": "refused: hard-swish, not of the family",
    "function call": "refused: a function call in the modelling code",
    "looked up inside forward": "refused: looked up anew inside forward",
    "hard-coded": "refused: hard-coded modules",
}


def _why(row: dict[str, str]) -> str:
    if row["verdict"] != "refused":
        return f"**{row['verdict']}**"
    why = next((why for pattern, why in _WHY.items() if re.search(pattern, row["reason"])), "refused: " + row["reason"][:80])
    return why + ("; `hard_coded=True` folds them" if row["folded_hard_coded"].endswith("sites") else "")


def compare(old: list[dict[str, str]], new: list[dict[str, str]]) -> str:
    """Model types that came, went, or have another verdict or number of sites."""
    before, after = ({(r["model_type"], r["auto"]): r for r in rows} for rows in (old, new))
    lines = [f"gone: {' '.join(key)}" for key in before if key not in after]
    lines += [f"new: {' '.join(key)}: {row['verdict']}" for key, row in after.items() if key not in before]
    for key in before.keys() & after.keys():
        for field in ("verdict", "sites"):
            if before[key][field] != after[key][field]:
                lines.append(f"{' '.join(key)}: {field} {before[key][field] or 0} → {after[key][field] or 0}")
    return "\n".join(sorted(lines)) or "nothing changed"


def _text(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else " ".join(str(value).split())[:600]


def append(results: Path, row: dict[str, str], fields: list[str] = FIELDS) -> None:
    """Add a row; one of the same model and class is replaced."""
    rows = [r for r in read(results) if (r["model_type"], r["auto"]) != (row["model_type"], row["auto"])] + [row]
    results.parent.mkdir(parents=True, exist_ok=True)
    partial = results.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: (r["auto"] != "AutoModel", r["model_type"], r["auto"])))
    partial.replace(results)


if __name__ == "__main__":
    main()
