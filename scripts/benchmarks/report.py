"""The tables of docs/cost.md and docs/how-to/larger-than-memory.md, from the committed results alone.

python -m scripts.benchmarks.report     # Markdown to standard output, measures nothing
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.tools.tables import read

RESULTS = Path(__file__).parent / "results"
CPU = RESULTS / "benchmark-cpu-torch2.13.0-transformers5.23.0.csv"
CUDA = RESULTS / "benchmark-cuda-torch2.11.0-transformers5.23.0.csv"
KERNELS = RESULTS / "cuda-kernels-NVIDIA-H100-80GB-HBM3.csv"
STREAMING = RESULTS / "streaming-cpu-torch2.13.0.csv"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
RIVALS = {
    "λ-GELU": "λ-GELU",
    "λ-GELU, λ per neuron": "λ-GELU, λ per neuron",
    "λ-GELU, no kernel": "λ-GELU without a C++ compiler",
    "learnable Swish": "learnable Swish, autograd",
    "xIELU": "xIELU of transformers, in Python",
}
SHOWN = (("float32", "1024×3072"), ("bfloat16", "1024×3072"), ("float32", "64×3072"))
PASSES = {
    "forward": ("forward", "λ-GELU"),
    "backward, λ's gradient too": ("backward", "λ-GELU"),
    "forward, λ per neuron": ("forward", "λ-GELU, λ per neuron"),
    "backward, λ per neuron": ("backward", "λ-GELU, λ per neuron"),
}
Row = dict[str, str]


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(activations(read(CPU)), kernels(read(KERNELS)), streaming(read(STREAMING)), sep="\n\n")


def ratio(row: Row) -> str:
    """The median, the least and the most, as multiples of stock's time."""
    return f"{float(row['time']):.2f} ({float(row['least']):.2f}–{float(row['most']):.2f})"


def activations(rows: list[Row]) -> str:
    """Forward and backward on a CPU as multiples of F.gelu's time, and the memory that is kept."""
    heads = [f"{SHORT[dtype]}, {shape.replace('×', ' × ')}" for dtype, shape in SHOWN]
    lines = [f"| | {' | '.join(heads)} | kept for backward |", "|" + "---|" * (len(heads) + 2)]
    own = {(row["what"], row["dtype"], row["shape"]): row for row in rows if row["section"] == "activation"}
    for what, label in RIVALS.items():
        chosen = [own[(what, *kind)] for kind in SHOWN]
        kept = list(dict.fromkeys(f"{value:.2f}" for value in sorted(float(row["memory"]) for row in chosen)))
        cells = [*map(ratio, chosen), "–".join(dict.fromkeys((kept[0], kept[-1])))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels(rows: list[Row]) -> str:
    """Of the kernels on a GPU: time as a multiple of F.gelu's, and bandwidth as a share of a copy's."""
    columns = list(dict.fromkeys((row["dtype"], row["elements"]) for row in rows))
    heads = [f"{SHORT[dtype]}, {int(elements) / 1e6:.0f}M" for dtype, elements in columns]
    lines = [f"| elements | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    own = {(row["pass"], row["what"], row["dtype"], row["elements"]): row for row in rows}
    for label, kind in PASSES.items():
        chosen = [own[(*kind, *column)] for column in columns]
        cells = [f"{float(row['of_gelu']):.2f}, {100 * float(row['share_of_copy']):.0f} %" for row in chosen]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def streaming(rows: list[Row]) -> str:
    """Refits whose weights stay in files against those in memory: peak memory and seconds."""
    heads = ("blocks", "weights, MB", "peak, MB: streamed", "in memory", "seconds: streamed", "in memory")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for blocks in dict.fromkeys(row["blocks"] for row in rows):
        ways = [row for way in ("streamed", "in memory") for row in rows if (row["blocks"], row["way"]) == (blocks, way)]
        cells = [blocks, f"{4 * int(ways[0]['parameters']) / 1e6:.0f}"]
        cells += [f"{float(row[name]):.0f}" for name in ("peak_mb", "seconds") for row in ways]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
