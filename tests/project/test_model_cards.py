"""The cards in model_cards/ are what the package renders now."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.tools.cards import CARDS, rendered

RECORDS = sorted(CARDS.glob("*.json"))


def test_each_card_has_its_record() -> None:
    assert RECORDS
    assert {path.stem for path in CARDS.glob("*.md")} - {"README"} == {path.stem for path in RECORDS}


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_card_is_up_to_date(record: Path) -> None:
    """`make cards` renders them again."""
    assert record.with_suffix(".md").read_text(encoding="utf-8") == rendered(record)
