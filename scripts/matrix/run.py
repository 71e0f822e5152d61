"""Trains each cell of the matrix and its twin, and writes down how far apart they are.

    python -m scripts.matrix.run                    # every cell that is not in the table yet; a stopped run goes on
    python -m scripts.matrix.run --parts optimizers # the cells of one part
    python -m scripts.matrix.run --table            # the tables of what is there, as Markdown
    python -m scripts.matrix.run --page             # the same, into docs/matrix.md

Each cell runs in a process of its own; one that dies there is written down as "off", with its last line. Each part has a CSV
file of its own, and the tables are of all that are in the folder. The exit code is 1 where a cell is off.
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
from scripts.matrix.table import CELL, table
from scripts.tools.processes import ROOT, run_module
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "matrix.md"
MARKS = ("<!-- tables: make matrix -->\n", "<!-- end of tables -->")
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
    """Add the rows that the files of the folder lack; returns all of them."""
    known = {(row["part"], *(row[field] for field in CELL)) for row in rows_in(results)}
    wanted = [(name, i, cell) for name in parts for i, cell in enumerate(part(name).CELLS)]
    wanted = [(name, i, cell) for name, i, cell in wanted if (name, *asdict(cell).values()) not in known]
    for name, i, cell in tqdm(wanted, unit="cell", disable=None):
        append(results / f"{name}.csv", FIELDS, [_row(name, cell, outcome(name, i))])
    return rows_in(results)


def rows_in(results: Path) -> list[dict[str, str]]:
    """All rows of the folder's files, part by part."""
    rows = [row for path in sorted(results.glob("*.csv")) for row in read(path)]
    return sorted(rows, key=lambda row: PARTS.index(row["part"]))


def page(text: str, rows: list[dict[str, str]]) -> str:
    """A page with the tables of these rows between its marks."""
    head, rest = text.split(MARKS[0])
    return f"{head}{MARKS[0]}\n{table(rows)}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def _row(name: str, cell: Cell, found: Outcome) -> dict[str, str]:
    figure = "" if found.figure is None else f"{found.figure:.1e}"
    return {"part": name, **asdict(cell), "verdict": found.verdict, "figure": figure, "text": " ".join(found.text.split())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.matrix.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--table", action="store_true", help="print what is in the table, as Markdown")
    parser.add_argument("--page", action="store_true", help="put it into docs/matrix.md")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a cell's number, in the process that runs it
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        (name,) = arguments.parts
        module = part(name)
        print("\n" + json.dumps(asdict(module.measure(module.CELLS[arguments.one]))), flush=True)
        return
    shown = arguments.table or arguments.page
    rows = rows_in(arguments.results) if shown else run(arguments.parts, arguments.results)
    if arguments.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    else:
        print(table(rows))
    off = [row for row in rows if row["verdict"] == "off"]
    if off:
        sys.exit(f"{len(off)} of {len(rows)} cells are off")


if __name__ == "__main__":
    main()
