"""What compensated substitution costs against the size of a model: seconds and peak memory.

    python -m scripts.benchmarks.refit

BERTs of five sizes with random weights, 32 × 128 random tokens. Seconds are also given as a multiple of plain forward passes
over the same batches, measured before and after in the same process; memory is what is added to the peak of those passes.
Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time

import torch
from transformers import BertConfig, BertModel

import hf_lambda_gelu as hlg
from scripts.tools.processes import run_module

SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}  # layers, width
BATCHES, BATCH, LENGTH = 4, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.refit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one)))
        return
    print(
        "| BERT | parameters, millions | weights, MB | seconds | forward passes | peak memory, MB more | … of the weights |"
    )
    print("|" + "---|" * 7)
    for size in options.sizes:
        arguments = ("--one", size, "--threads", str(options.threads))
        child = run_module("scripts.benchmarks.refit", *arguments, stdout=subprocess.PIPE)
        if child.returncode:
            raise SystemExit(f"{size} failed with exit code {child.returncode}: see its output above")
        found = json.loads(child.stdout.splitlines()[-1])
        weights = 4 * found["parameters"] / 1e6
        print(
            f"| {size} | {found['parameters'] / 1e6:.1f} | {weights:.0f} | {found['seconds']:.1f} | "
            f"{found['seconds'] / found['forward']:.1f} | {found['memory']:.0f} | {found['memory'] / weights:.1f} × |",
            flush=True,
        )


def measure(size: str) -> dict[str, float]:
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
    start = time.perf_counter()
    hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    seconds = time.perf_counter() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "forward": (before + forward(model, batches)) / 2,
        "memory": memory,
    }


@torch.no_grad()
def forward(model: BertModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of a pass over the batches, the second of two."""
    for _ in range(2):
        start = time.perf_counter()
        for batch in batches:
            model(**batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
