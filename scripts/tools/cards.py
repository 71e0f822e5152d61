"""Render model_cards/*.md from the records beside them, as the package renders the card of a saved model.

python -m scripts.tools.cards           # after a change of the card's template
python -m scripts.tools.cards --take    # first take the records of the models that the demos made, in runs/
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from hf_lambda_gelu.checkpoints.card import REPORT_NAME, render_card

CARDS = Path(__file__).parents[2] / "model_cards"
RUNS = ("demo-text", "demo-vision")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tools.cards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--take", action="store_true", help="copy the records of the demos' models first")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the demos left their results")
    options = parser.parse_args()
    if options.take:
        for run in RUNS:
            source = options.runs / run / "lambda_gelu" / "relu" / REPORT_NAME
            if not source.is_file():
                parser.error(f"{source} is missing: run `make demo` and `make demo-vision` first")
            shutil.copy(source, CARDS / f"{json.loads(source.read_text(encoding='utf-8'))['model_name']}.json")
    for record in sorted(CARDS.glob("*.json")):
        record.with_suffix(".md").write_text(rendered(record), encoding="utf-8")
        print(record.with_suffix(".md"))


def rendered(record: Path) -> str:
    return str(render_card(json.loads(record.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
