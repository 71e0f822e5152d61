"""Finds the figures of a page, and says which of them nothing explains, or two things at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

NUMBER = r"[−+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[−+-]?\d+|⁻[⁰-⁹¹²³]+)?"
UNIT = r"\s?(?:%|×(?!\s*\d)|(?:x|times|points?|CPU\sseconds|[kMGT]i?B|[mµn]?s|seconds?|minutes?|hours?)\b)"
FIGURE = re.compile(
    rf"(?<![\w.-])(?:\d+ of (?:all )?\d+|(?P<number>{NUMBER})(?:–(?P<last>{NUMBER}))?(?P<unit>{UNIT})?)(?!\.?\d|[⁰¹²³⁴-⁹])"
)
CELL = re.compile(r"(?<=\|) *(?P<figure>" + NUMBER + r") *(?=\|)")
# what holds numbers that are none: code, comments, where links lead, and versions of software
NO_FIGURES = [
    re.compile(r"^ *(?P<fence>```|~~~).*?^ *(?P=fence)$", re.DOTALL | re.MULTILINE),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"(`+)(?!`).+?\1"),
    re.compile(r"(?<=\])(?:\([^)\s]*\)|\[[^\]]*\])"),
    re.compile(r"https?://\S+"),
    re.compile(r"arXiv \d{4}\.\d{5}"),
    re.compile(r"\b\d+\.\d+\.\d+\b"),
    re.compile(r"\b(?:Python|[Tt]orch|Triton|transformers|TRL|release|wav2vec|ERNIE)\s(?:up\sto\s)?\d+(?:\.\d+)*"),
]


@dataclass(frozen=True)
class Figure:
    """A number that looks measured, and the characters of the page that it takes."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Explanation:
    """What stands behind figures: its kind and name, and what the page must say word for word, however lines break."""

    name: str
    fragments: tuple[str, ...]


def figures(page: str) -> list[Figure]:
    """Numbers with a decimal point, an exponent or a unit, "a of b", and table cells that are numbers; code is left out."""
    text = page
    for pattern in NO_FIGURES:
        text = pattern.sub(lambda found: re.sub(r"[^\n]", "\0", found.group()), text)
    return sorted(set(_found(text)), key=lambda figure: figure.start)


def _found(text: str) -> Iterator[Figure]:
    cells = set()
    for row in re.finditer(r"^\|.*\|$", text, re.MULTILINE):
        for cell in CELL.finditer(text, row.start(), row.end()):
            cells.add(cell.start("figure"))
            yield Figure(cell["figure"], cell.start("figure"), cell.end("figure"))
    for found in FIGURE.finditer(text):
        number = found["number"]
        measured = number is None or found["unit"] or re.search(r"[.e⁻]", number + (found["last"] or ""))
        if measured and found.start() not in cells:
            yield Figure(found.group(), found.start(), found.end())


def places(page: str, fragment: str) -> list[tuple[int, int]]:
    """Where the page says it. A line of a table is a whole line."""
    if fragment.startswith("|"):
        pattern = rf"^{re.escape(fragment)}$"
    else:
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, fragment.split())) + r"(?!\w)"
    return [found.span() for found in re.finditer(pattern, page, re.MULTILINE)]


def complaints(name: str, page: str, explanations: list[Explanation]) -> list[str]:
    """What the page should say and does not, and figures that nothing explains, or two do."""
    wrong, spans = [], []
    for explanation in explanations:
        for fragment in explanation.fragments:
            here = places(page, fragment)
            spans += [(*place, explanation.name) for place in here]
            if not here:
                wrong.append(f"{name} does not say {fragment!r}, which {explanation.name} gives")
    for figure in figures(page):
        names = sorted({name for start, end, name in spans if start <= figure.start and figure.end <= end})
        where = f"{name}:{page.count(chr(10), 0, figure.start) + 1}: {figure.text}"
        if not names:
            wrong.append(f"{where} is explained by nothing")
        if len(names) > 1:
            wrong.append(f"{where} is explained twice, by {' and by '.join(names)}")
    return wrong
