"""Runs every tool on the three networks, prints the table and keeps it.

    python -m scripts.downstream --results runs/downstream.csv     # ten minutes on one core; what `make downstream` runs
    python -m scripts.downstream                                   # README's table; measures what it lacks

Rows that are there are kept (delete the file to measure anew), so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from ..tools.tables import append, read
from . import blocks, compression, exact, inference, quantised
from .rows import FIELDS, Row, markdown

RESULTS = Path(__file__).parent / "results" / "downstream.csv"
PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "onnx": inference.onnx,
    "int8": quantised.int8,
    "solvers": exact.solvers,
    "blocks": blocks.blocks,
    "distance": exact.distance,
    "zeros": inference.zeros,
    "sparse": inference.sparse,
    "hardware": exact.hardware,
    "compression": compression.compression,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.downstream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    kept = read(options.results)
    for part in options.only:
        if not any(row["part"] == part for row in kept):
            rows = [{"part": part, **asdict(row)} for row in PARTS[part]()]
            append(options.results, ["part", *FIELDS], rows)
    order = list(PARTS)
    rows = sorted(read(options.results), key=lambda row: order.index(row["part"]))
    print(markdown(Row(**{name: row[name] for name in FIELDS}) for row in rows))


if __name__ == "__main__":
    main()
