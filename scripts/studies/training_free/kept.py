"""What the networks that the study of hinges kept say and cost: greedy answers side by side, and time on a CPU.

    python -m scripts.studies.training_free.hinges --tasks smollm2 --seeds 0 --keep runs/hinges    # first
    python -m scripts.studies.training_free.kept answers runs/hinges     # → results/hinges_answers.json
    python -m scripts.studies.training_free.kept latency runs/hinges     # → results/hinges_latency.csv

Answers are those to the held prompts of scripts/relu_ize_lm.py, 60 tokens at most, to be read by a person. Times are of one
thread, of the smooth network and of each kept one, as it is and after `sparsify_ffn`, in turns: a prompt of 256 tokens, and
a token after 64. A ratio is to the smooth network's time in the same turn: the median of nine, with the least and the most.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

import hf_lambda_gelu as hlg
from scripts.relu_ize_lm import QUESTIONS, Arguments, reply, windows
from scripts.studies.training_free.hinges import VARIANTS
from scripts.tools.assets import asset
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parents[1] / "results"
FIELDS = ("network", "form", "what", "milliseconds", "ratio", "least", "most", "versions")
TURNS = 9
PROMPT, CONTEXT, TOKENS = 256, 64, 8


def networks(folder: Path) -> dict[str, Path]:
    """The smooth network and the kept ones, by variant, from the narrowest on."""
    kept = {path.name.split("-")[1]: path for path in sorted(folder.glob("smollm2-*-seed0"))}
    if not kept:
        raise SystemExit(
            f"{folder} has no smollm2-…-seed0: run python -m scripts.studies.training_free.hinges --keep {folder}"
        )
    return {"smooth": Path(asset("smollm2")), **kept}


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def answers(folder: Path, results: Path) -> None:
    """Greedy answers of each network."""
    tokenizer = AutoTokenizer.from_pretrained(asset("smollm2"))
    said: dict[str, dict[str, str]] = {question: {} for question in QUESTIONS}
    for name, path in networks(folder).items():
        model = load(path)
        for question in QUESTIONS:
            said[question][name] = reply(model, tokenizer, question)
    results.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(results.read_text(encoding="utf-8"))


def prompt(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(input_ids=ids[:, :PROMPT], logits_to_keep=1)

    return run


def tokens(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """`TOKENS` tokens, one at a time, after `CONTEXT`."""
    filled = DynamicCache()
    model(input_ids=ids[:, :CONTEXT], past_key_values=filled)

    def run() -> None:
        cache = copy.deepcopy(filled)
        for place in range(CONTEXT, CONTEXT + TOKENS):
            model(input_ids=ids[:, place : place + 1], past_key_values=cache)

    return run


@torch.no_grad()
def latency(folder: Path, results: Path) -> None:
    """Times of all, in turns."""
    torch.set_num_threads(1)
    ids = windows(Arguments(), AutoTokenizer.from_pretrained(asset("smollm2")), "test", PROMPT)[:1]
    models: dict[tuple[str, str], PreTrainedModel] = {}
    for name, path in networks(folder).items():
        models[name, "dense"] = load(path)
        if name != "smooth":
            models[name, "sparse"] = load(path)
            hlg.sparsify_ffn(models[name, "sparse"], {"input_ids": ids})
    for what, make, each in (("prompt", prompt, 1), ("token", tokens, TOKENS)):
        runs = {key: make(model, ids) for key, model in models.items()}
        for run in runs.values():
            run()
        turns: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in range(TURNS):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                turns[key].append((time.perf_counter() - start) / each)
        append(results, FIELDS, (_row(*key, what, times, turns["smooth", "dense"]) for key, times in turns.items()))
    print(results.read_text(encoding="utf-8"))


def _row(network: str, form: str, what: str, times: list[float], smooth: list[float]) -> dict[str, object]:
    ratios = [one / other for one, other in zip(times, smooth, strict=True)]
    return {
        "network": network,
        "form": form,
        "what": what,
        "milliseconds": f"{1e3 * statistics.median(times):.1f}",
        "ratio": f"{statistics.median(ratios):.2f}",
        "least": f"{min(ratios):.2f}",
        "most": f"{max(ratios):.2f}",
        "versions": f"torch {torch.__version__}",
    }


def table(results: Path = RESULTS / "hinges_latency.csv") -> str:
    """By network, as Markdown: milliseconds of the smooth one, ratios of the others."""
    found: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for row in read(results):
        found.setdefault(row["network"], {})[row["form"], row["what"]] = row
    lines = ["| network | a prompt | a token | a token, sparse |", "|---|---|---|---|"]
    for name in ("smooth", *VARIANTS):
        if name in found:
            cells = [_cell(found[name].get(key)) for key in (("dense", "prompt"), ("dense", "token"), ("sparse", "token"))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    return f"{row['milliseconds']} ms" if row["network"] == "smooth" else f"{row['ratio']} [{row['least']}–{row['most']}]"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.kept",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("answers", "latency"))
    parser.add_argument("folder", type=Path, help="where the study kept them")
    parser.add_argument("--out", type=Path, help="file of the results")
    options = parser.parse_args(argv)
    if options.what == "answers":
        answers(options.folder, options.out or RESULTS / "hinges_answers.json")
    else:
        latency(options.folder, options.out or RESULTS / "hinges_latency.csv")


if __name__ == "__main__":
    main()
