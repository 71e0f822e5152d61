"""A row of the table: a tool, what was asked of it, and what it says of each network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields

REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """What one tool makes of the three networks."""

    tool: str
    what: str
    gelu: str
    lambda_gelu: str
    relu: str


FIELDS = [field.name for field in fields(Row)]


def answer(ask: Callable[[], str], refusals: tuple[type[Exception], ...] = (), says: str = "") -> str:
    """What `ask` returns; "refused" where it raises one of `refusals` whose message holds `says`."""
    try:
        return ask()
    except refusals as error:
        if says not in str(error):
            raise
        return REFUSED


def markdown(rows: Iterable[Row]) -> str:
    """The table for a page."""
    lines = ["| tool | what | GELU | λ-GELU | ReLU |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(astuple(row))} |" for row in rows])
