"""What compensated substitution costs against the size of a model: CPU seconds and peak memory.

    python -m scripts.benchmarks.refit            # the sizes that results/refit.csv lacks; prints the table
    python -m scripts.benchmarks.refit --table    # the table alone

BERTs of five sizes with random weights, 32 × 128 random tokens. CPU seconds, which other work moves less than the clock, are
also given as a multiple of plain forward passes over the same batches, measured before and after in the same process; memory
is what is added to the peak of those passes. Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

import hf_lambda_gelu as hlg
from scripts.tools.processes import run_module
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parent / "results" / "refit.csv"
FIELDS = ("size", "threads", "parameters", "seconds", "forward", "memory", "torch")
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}  # layers, width
BATCHES, BATCH, LENGTH = 4, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.refit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and measure nothing")
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one)))
        return
    for size in [] if options.table else options.sizes:
        run(options.results, size, options.threads)
    print(table(read(options.results)))


def run(results: Path, size: str, threads: int) -> None:
    """Measure and append, unless the row is there."""
    if any((row["size"], row["threads"]) == (size, str(threads)) for row in read(results)):
        return
    child = run_module("scripts.benchmarks.refit", "--one", size, "--threads", str(threads), stdout=subprocess.PIPE)
    if child.returncode:
        raise SystemExit(f"{size} failed with exit code {child.returncode}: see its output above")
    append(results, FIELDS, [{"size": size, "threads": threads, **json.loads(child.stdout.splitlines()[-1])}])


def table(rows: list[dict[str, str]]) -> str:
    """A line for each size, the smallest first."""
    heads = ("BERT", "parameters, millions", "weights, MB", "CPU seconds", "forward passes", "peak memory, MB more")
    lines = [f"| {' | '.join(heads)} | … of the weights |", "|" + "---|" * (len(heads) + 1)]
    for row in sorted(rows, key=lambda row: list(SIZES).index(row["size"])):
        parameters, seconds, memory = (float(row[name]) for name in ("parameters", "seconds", "memory"))
        weights = 4 * parameters / 1e6
        lines.append(
            f"| {row['size']} | {parameters / 1e6:.1f} | {weights:.0f} | {seconds:.1f} | "
            f"{seconds / float(row['forward']):.1f} | {memory:.0f} | {memory / weights:.1f} × |"
        )
    return "\n".join(lines)


def measure(size: str) -> dict[str, Any]:
    """Parameters; CPU seconds of the refit and of a forward pass over its batches; MB that the refit adds to the peak."""
    layers, width = SIZES[size]
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    model = BertModel(config).eval()
    batches = [{"input_ids": torch.randint(1000, 30000, (BATCH, LENGTH))} for _ in range(BATCHES)]
    hlg.convert(model)
    before = forward(model, batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    seconds = time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
        "forward": round((before + forward(model, batches)) / 2, 3),
        "memory": round(memory),
        "torch": torch.__version__,
    }


@torch.no_grad()
def forward(model: BertModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """CPU seconds of a pass over the batches, the second of two."""
    for _ in range(2):
        start = time.process_time()
        for batch in batches:
            model(**batch)
    return time.process_time() - start


if __name__ == "__main__":
    main()
