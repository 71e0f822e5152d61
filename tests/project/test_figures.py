"""Every figure of README and the pages is a table's, is made from results or code, or is a constant with a reason."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from support.figures.constants import CONSTANTS, Constant
from support.figures.defaults import COMPUTED
from support.figures.finder import Explanation, complaints, figures
from support.figures.sentences import MEASURED
from support.figures.tables import TABLES

from scripts.benchmarks import refit, refit_parts

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
HELP = """
A figure that nothing explains: show a table that a command makes from committed results (tests/support/figures/tables.py),
make the sentence from them (sentences.py) or from the code (defaults.py), give the reason of a constant (constants.py), or
say it without the number. What a page does not say: write what is given, or take the entry out. Explained twice: keep one"""


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def explanations(page: str) -> list[Explanation]:
    """What stands behind the figures of a page."""
    found = [
        Explanation(f"table {name!r}", tuple(line for line in make().splitlines() if line.startswith("|")))
        for name, (where, make) in TABLES.items()
        if where == page
    ]
    found += [
        Explanation(f"sentence {name!r}", tuple(make()))
        for name, (where, make) in (*MEASURED.items(), *COMPUTED.items())
        if where == page
    ]
    return found + [Explanation(f"constant {each.says!r}", (each.says,)) for each in CONSTANTS if each.page == page]


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_the_page(page: str) -> None:
    wrong = complaints(page, text(page), explanations(page))
    assert not wrong, "\n".join([*wrong, HELP])


def test_what_is_made_is_on_a_page() -> None:
    """No table is empty, and nothing is made for a page that is gone."""
    assert {page for page, _ in (*TABLES.values(), *MEASURED.values(), *COMPUTED.values())} <= set(PAGES)
    assert {constant.page for constant in CONSTANTS} <= set(PAGES)
    assert [name for name, (_, make) in TABLES.items() if len(make().splitlines()) < 3] == []


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda constant: f"{constant.page} {constant.says}")
def test_constants_hold(constant: Constant) -> None:
    """The code says the same; and the constant is a figure's, which would fail without it."""
    assert not constant.is_stale(), f"{constant.path} does not hold {constant.text!r}: correct {constant.page}"
    assert figures(constant.says)


# ------------------------------------------------------------------------------------------------------ the test's own test

PAGE = """# A page

It takes 12 seconds, 3.5 times less than before (`--rate 0.5`, Python 3.10, [issue 1.5](https://example.org/1.5)).

| what | ratio |
|---|---|
| ours | 1.25 |
| theirs | 17 |

```
print(0.75)
```
"""
TABLE = Explanation("table", ("| what | ratio |", "|---|---|", "| ours | 1.25 |", "| theirs | 17 |"))
SENTENCE = Explanation("sentence", ("takes 12 seconds, 3.5 times less than before",))


def test_what_is_found() -> None:
    """Code, links, versions, and numbers that count are none."""
    assert [figure.text for figure in figures(PAGE)] == ["12 seconds", "3.5 times", "1.5", "1.25", "17"]


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        ("from 39–51 % to 4 %", ["39–51 %", "4 %"]),
        ("−10.3 ± 8.4, and +0.0", ["−10.3", "8.4", "+0.0"]),
        ("605 of 607 hold", ["605 of 607"]),
        ("1.5 GB, 170 MB, 22 ms, 2 × as long", ["1.5 GB", "170 MB", "22 ms", "2 ×"]),
        ("to 1e-5, 10⁻⁶ or 2 · 10⁻²", ["1e-5", "10⁻⁶", "10⁻²"]),
        (
            "swapped in: 4,995.5; ×1.20, 2.6x, 3x as fast, 30ms, 1.3B weights",
            ["4,995.5", "1.20", "2.6x", "3x", "30ms", "1.3"],
        ),
        ("(0.91,1.12) of it, λ–0.5", ["0.91", "1.12", "0.5"]),
        ("300 examples of 768–3072, 1 × 1, 2¹⁴, ViT-B/16, 17M elements, torch 2.13.0, kosmos-2.5, `0.5`, 60 steps", []),
    ],
)
def test_what_a_figure_is(sentence: str, found: list[str]) -> None:
    assert [figure.text for figure in figures(sentence)] == found


def test_a_figure_that_nothing_explains(tmp_path: Path) -> None:
    """It is named by page, line and number, with what to do; each kind of explanation ends it."""
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    wrong = complaints(page.name, page.read_text(encoding="utf-8"), [TABLE, SENTENCE])
    assert wrong == ["page.md:3: 1.5 is explained by nothing"]
    assert complaints(page.name, PAGE, [TABLE, SENTENCE, Explanation("constant", ("issue 1.5",))]) == []


def test_a_figure_that_two_explain() -> None:
    (first, *rest) = complaints(
        "page.md", PAGE, [TABLE, SENTENCE, Explanation("constant", ("takes 12 seconds", "issue 1.5"))]
    )
    assert first.startswith("page.md:3: 12 seconds is explained twice, by constant and by sentence")
    assert rest == []


def test_what_the_page_says_no_more() -> None:
    """A row of another value, a sentence that was reworded: both the figure and the entry are named."""
    changed = PAGE.replace("1.25", "1.26").replace("12 seconds", "some seconds")
    wrong = complaints("page.md", changed, [TABLE, SENTENCE, Explanation("constant", ("issue 1.5",))])
    assert [line for line in wrong if "does not say" in line] == [
        "page.md does not say '| ours | 1.25 |', which table gives",
        "page.md does not say 'takes 12 seconds, 3.5 times less than before', which sentence gives",
    ]
    assert any(line.startswith("page.md:7: 1.26 is explained by nothing") for line in wrong)


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        (refit_parts, "1,1,0,refit,203.8", "1,1,0,refit,213.8"),
        (refit, "tiny,1,4385920", "tiny,1,5385920"),
    ],
    ids=["sentence", "table"],
)
def test_a_result_that_changed(
    command: ModuleType, before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another value in a committed table is another sentence, or another row, than the page has."""
    results = tmp_path / "results.csv"
    rows = command.RESULTS.read_text(encoding="utf-8")
    assert before in rows
    results.write_text(rows.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(command, "RESULTS", results)
    wrong = complaints("docs/how-it-works.md", text("docs/how-it-works.md"), explanations("docs/how-it-works.md"))
    assert any("does not say" in line for line in wrong)
    assert any("is explained by nothing" in line for line in wrong)


def test_a_constant_whose_code_changed() -> None:
    constant = next(each for each in CONSTANTS if each.path)
    assert not constant.is_stale()
    assert Constant(constant.page, constant.says, constant.reason, constant.path, "stats.t.ppf(0.95,").is_stale()
