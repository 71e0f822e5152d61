"""Trains each cell of the matrix and its twin, and writes down how far apart they are.

    python -m scripts.matrix.run                    # every cell that is not in the table yet; a stopped run goes on
    python -m scripts.matrix.run --parts optimizers # the cells of one part
    python -m scripts.matrix.run --table            # the tables of docs/matrix.md

Each cell runs in a process of its own; one that dies there is written down as "off", with its last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from tqdm.auto import tqdm

from scripts.matrix.cells import Cell, Outcome, Part
from scripts.tools.processes import run_module
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parent / "results" / "matrix.csv"
CELL = ["optimizer", "precision", "engine", "trainer"]
FIELDS = ["part", *CELL, "verdict", "figure", "text"]
PARTS = ("optimizers", "engines", "trainers")
LIMIT_SECONDS = 600


def part(name: str) -> Part:
    """The part of that name; its libraries are imported with it."""
    return import_module(f"scripts.matrix.{name}")  # type: ignore[return-value]


def outcome(name: str, index: int) -> Outcome:
    """That cell of that part, run in a process of its own."""
    try:
        done = run_module(
            "scripts.matrix.run", "--parts", name, "--one", str(index), capture_output=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Outcome("off", None, f"no end within {LIMIT_SECONDS} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Outcome(**json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Outcome("off", None, f"exit code {done.returncode}: {last}")


def run(parts: list[str], results: Path) -> list[dict[str, str]]:
    """Add the rows that `results` lacks; returns all of it."""
    known = {(row["part"], *(row[field] for field in CELL)) for row in read(results)}
    wanted = [(name, i, cell) for name in parts for i, cell in enumerate(part(name).CELLS)]
    wanted = [(name, i, cell) for name, i, cell in wanted if (name, *asdict(cell).values()) not in known]
    for name, i, cell in tqdm(wanted, unit="cell", disable=None):
        append(results, FIELDS, [_row(name, cell, outcome(name, i))])
    return read(results)


def _row(name: str, cell: Cell, found: Outcome) -> dict[str, str]:
    figure = "" if found.figure is None else f"{found.figure:.1e}"
    return {"part": name, **asdict(cell), "verdict": found.verdict, "figure": figure, "text": " ".join(found.text.split())}


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: one line a cell, a table for each part."""
    lines = []
    for name in dict.fromkeys(row["part"] for row in rows):
        lines += [
            "",
            f"**{name}**",
            "",
            "| optimizer | precision | engine | trainer | λ against the twin |",
            "|---|---|---|---|---|",
        ]
        for row in (row for row in rows if row["part"] == name):
            text = row["text"].replace("|", "\\|")
            told = row["figure"] if row["verdict"] == "equal" else f"{row['verdict']}: {row['figure']} {text}"
            lines.append(f"| {' | '.join(row[field] for field in CELL)} | {told} |")
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.matrix.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is in the table, as Markdown")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a cell's number, in the process that runs it
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        (name,) = arguments.parts
        module = part(name)
        print("\n" + json.dumps(asdict(module.measure(module.CELLS[arguments.one]))), flush=True)
        return
    rows = read(arguments.results) if arguments.table else run(arguments.parts, arguments.results)
    print(table(rows))
    off = [row for row in rows if row["verdict"] == "off"]
    if off:
        sys.exit(f"{len(off)} of {len(rows)} cells are off")


if __name__ == "__main__":
    main()
