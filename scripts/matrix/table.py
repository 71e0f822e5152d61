"""The matrix as Markdown that a person reads: rows that say the same are one row."""

from __future__ import annotations

from collections.abc import Iterable

CELL = ["optimizer", "precision", "engine", "trainer"]
WITHOUT = "without λ too: "  # of what has nothing to do with λ: the stock library refuses the twin in the same words
Row = dict[str, str]


def table(rows: list[Row]) -> str:
    """For each part: what is equal and how far from its twin at most, what is refused and why, and what is off."""
    return "\n\n".join(_part(name, [row for row in rows if row["part"] == name]) for name in _of(rows, "part"))


def _part(name: str, rows: list[Row]) -> str:
    """One column lists its values, that with the most of them; columns with one value are said once."""
    listed = max(CELL, key=lambda field: len(_of(rows, field)))
    fixed = [field for field in CELL if field != listed and len(_of(rows, field)) == 1]
    others = [field for field in CELL if field != listed and field not in fixed]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("equal", "refused", "off")}
    said = f"### By {name}\n\n{len(rows)} cells: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    said += f"; {', '.join(rows[0][field] for field in fixed)}." if fixed else "."
    blocks = [said, _equal([row for row in rows if row["verdict"] == "equal"], listed, others)]
    refused = [row for row in rows if row["verdict"] == "refused"]
    ours = [row for row in refused if not row["text"].startswith(WITHOUT)]
    blocks.append(_told(ours, listed, others, "refused by this package"))
    blocks.append(_told([row for row in refused if row not in ours], listed, others, "refused by the library itself"))
    blocks.append(_told([row for row in rows if row["verdict"] == "off"], listed, others, "**off**"))
    return "\n\n".join(filter(None, blocks))


def _equal(rows: list[Row], listed: str, others: list[str]) -> str:
    lines = []
    for key in dict.fromkeys(tuple(row[field] for field in others) for row in rows):
        group = [row for row in rows if tuple(row[field] for field in others) == key]
        largest = max(float(row["figure"]) for row in group)
        lines.append([*key, " · ".join(_of(group, listed)), f"{largest:.1e}"])
    return _markdown([*others, listed, "λ against the twin, at most"], lines)


def _told(rows: list[Row], listed: str, others: list[str], title: str) -> str:
    """One line for each text; a cell's own name in it does not make it another."""
    lines = []
    for text in dict.fromkeys(_text(row) for row in rows):
        group = [row for row in rows if _text(row) == text]
        seen = [", ".join(_of(group, field)) for field in others]
        lines.append([*seen, " · ".join(_of(group, listed)), text])
    return _markdown([*others, listed, title], lines)


def _text(row: Row) -> str:
    text = row["text"].removeprefix(WITHOUT).replace(repr(row["optimizer"]), "…")
    figure = f"{row['figure']}: " if row["figure"] else ""
    return f"{figure}{text}".replace("|", "\\|").replace("<", "&lt;")


def _of(rows: Iterable[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
