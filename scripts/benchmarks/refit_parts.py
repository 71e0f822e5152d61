"""Where the time of a refit goes, against its floor and against llm-compressor's SparseGPT on the same tokens.

    python -m scripts.benchmarks.refit_parts                 # SmolLM2-135M, 20,480 tokens, two threads, three rounds
    python -m scripts.benchmarks.refit_parts --layers 6 --tokens 4096 --threads 1

The floor is what a plain refit with the stream as its target takes: three passes of the blocks and, for each map, the
products of features and wanted changes, as plain matmuls. Times are CPU seconds, which other work moves less than the clock.
Each run is a process of its own, which gives its peak memory; rounds are interleaved. A row of the results is
one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.forward import measuring
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.engine import compensation
from hf_lambda_gelu.surgery.refit.ridge import Moments
from hf_lambda_gelu.surgery.refit.store import Store
from scripts.tools.assets import asset
from scripts.tools.processes import run_module
from scripts.tools.tables import append

RESULTS = Path(__file__).parent / "results" / "refit-parts.csv"
RIVALS = ("floor", "refit", "relu_ize", "sparsegpt")
PARTS = ("passes", "gram", "solves", "disk")
FIELDS = ("layers", "tokens", "length", "batch", "threads", "round", "what", "seconds", "clock", "memory", *PARTS)
_ROWS = 4096  # of features that are multiplied at a time for the floor
Batches = Sequence[dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.refit_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=30, help="the first so many of SmolLM2's 30")
    parser.add_argument("--tokens", type=int, default=20480, help="random ones, to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=1, help="windows of a batch; llm-compressor takes one at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=RIVALS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one, options)))
        return
    rows = list(rounds(options))
    append(options.results, FIELDS, rows)
    print(table(rows))


def rounds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each run, round after round."""
    names = [name for name in options.only if name != "sparsegpt" or importlib.util.find_spec("llmcompressor")]
    conditions = {name: getattr(options, name) for name in ("layers", "tokens", "length", "batch", "threads")}
    arguments = [str(part) for name, value in conditions.items() for part in (f"--{name}", value)]
    for number in range(options.rounds):
        for name in names:
            child = run_module(
                "scripts.benchmarks.refit_parts", "--one", name, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            if child.returncode:
                raise SystemExit(f"{name} failed with exit code {child.returncode}: {child.stderr[-2000:]}")
            found = json.loads(child.stdout.splitlines()[-1])
            print(f"round {number}, {name}: {found['seconds']} s, {found['memory']} MB", file=sys.stderr, flush=True)
            yield {**conditions, "round": number, "what": name, **found}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over the rounds; times of a rival over the floor of the same round."""
    lines = ["| | CPU seconds | × the floor | peak memory, MB | " + " | ".join(PARTS) + " |", "|" + "---|" * 8]
    floors = {row["round"]: float(row["seconds"]) for row in rows if row["what"] == "floor"}
    for name in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == name]
        ratios = [float(row["seconds"]) / floors[row["round"]] for row in own if row["round"] in floors]
        cells = [name, _median(own, "seconds"), f"{statistics.median(ratios):.2f}" if ratios else "", _median(own, "memory")]
        lines.append("| " + " | ".join([*cells, *(_median(own, part) for part in PARTS)]) + " |")
    return "\n".join(lines)


def _median(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [float(row[name]) for row in rows if row.get(name) not in (None, "")]
    return f"{statistics.median(values):g}" if values else ""


# ------------------------------------------------------------------------------------------------- in a process of its own


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds and seconds of the clock of one rival, its parts, and the peak memory of the process in MB."""
    model, batches = load(options.layers), tokens(options.tokens, options.length, options.batch)
    with torch.no_grad():
        model.base_model(**batches[0], use_cache=False)  # libraries are loaded and threads started
    parts: Counter[str] = Counter()
    run = prepared(name, model, batches, parts)
    cpu, clock = time.process_time(), time.perf_counter()
    run()
    seconds, clock = time.process_time() - cpu, time.perf_counter() - clock
    if name in ("refit", "relu_ize"):
        parts["passes"] = seconds - sum(parts.values())  # and whatever else there is
    found = {"seconds": round(seconds, 2), "clock": round(clock, 2), **{k: round(v, 2) for k, v in parts.items()}}
    return found | {"memory": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def load(layers: int) -> PreTrainedModel:
    """SmolLM2's first layers, in fp32."""
    folder = asset("smollm2")
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=layers)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    return model


def tokens(count: int, length: int, batch: int) -> Batches:
    """Random ones, in batches."""
    ids = torch.randint(100, 49000, (count // length, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)]


def prepared(name: str, model: PreTrainedModel, batches: Batches, parts: Counter[str]) -> Callable[[], Any]:
    """What is measured, all that comes before it done."""
    if name == "floor":
        return lambda: floor(model, batches, parts)
    if name == "sparsegpt":
        return sparsegpt(model, batches)
    hlg.convert(model)

    def refit() -> None:
        with timed(parts), compensation(model, batches) as work, measuring(model):
            work.run("least_squares")

    def relu_ize() -> None:
        with timed(parts):
            hlg.relu_ize(model, calibration=batches, compensate="least_squares")

    return refit if name == "refit" else relu_ize


@torch.no_grad()
def floor(model: PreTrainedModel, batches: Batches, parts: Counter[str]) -> None:
    """Three passes without the head, and for each down map the products of rows in its own precision."""
    start = time.process_time()
    for _ in range(3):
        for batch in batches:
            model.base_model(**batch, use_cache=False)
    parts["passes"] = time.process_time() - start
    config, count = model.config, sum(batch["input_ids"].numel() for batch in batches)
    sizes = [min(_ROWS, count - first) for first in range(0, count, _ROWS)]
    features = torch.randn(min(_ROWS, count), config.intermediate_size).relu()
    changes = torch.randn(len(features), config.hidden_size)
    start = time.process_time()
    for _ in range(config.num_hidden_layers):
        for size in sizes:
            for right in (features, changes):
                features[:size].T @ right[:size]
    parts["gram"] = time.process_time() - start


def sparsegpt(model: PreTrainedModel, batches: Batches) -> Callable[[], Any]:
    """llm-compressor on all linear maps but the head."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from loguru import logger
    from transformers import AutoTokenizer

    logger.disable("llmcompressor")
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for batch in batches for ids in batch["input_ids"]]
    recipe = SparseGPTModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    return lambda: oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        processor=AutoTokenizer.from_pretrained(asset("smollm2")),
        max_seq_length=len(rows[0]["input_ids"]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )


@contextmanager
def timed(parts: Counter[str]) -> Iterator[None]:
    """Within the block, the parts of a refit add up their CPU seconds."""
    places = [(Moments, "add", "gram"), (engine, "decide", "solves"), (Store, "put", "disk"), (Store, "get", "disk")]
    before = [getattr(owner, name) for owner, name, _ in places]

    def timing(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                parts[part] += time.process_time() - start

        return wrapped

    try:
        for (owner, name, part), function in zip(places, before, strict=True):
            setattr(owner, name, timing(function, part))
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


if __name__ == "__main__":
    main()
