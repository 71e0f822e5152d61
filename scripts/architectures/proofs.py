"""Every architecture that converts: saved as a ReLU network, and proven without inputs being given, as its users do it.

    python -m scripts.architectures.proofs                       # what is not in the CSV yet; half an hour on one core
    python -m scripts.architectures.proofs --models bert vit     # these, and print them

Of each row of results/coverage.csv that is exact, a tiny model is converted, substituted, saved by `save_relu_pretrained`
and proven twice with inputs that the package makes: as the model in memory (`verify_relu_pretrained`), and as the folder
that a command line is given. The stock process of a proof is a fork of one that has imported transformers and
never this package. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.hub import check_card
from hf_lambda_gelu.checkpoints.save import check_relu
from hf_lambda_gelu.checkpoints.verify import prove
from hf_lambda_gelu.structure.loading import load_saved
from scripts.architectures.run import RESULTS as COVERAGE
from scripts.architectures.sweep import sweep
from scripts.architectures.tiny_models import tiny_model

RESULTS = COVERAGE.with_name("proofs.csv")
FIELDS = ["model_type", "auto", "class", "verdict", "in_memory", "folder", "reason", "transformers"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.architectures.proofs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", metavar="TYPE", help="model types; by default all that convert exactly")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    sweep(_prove, options.results, FIELDS, options.models, good=["proven"])


def _prove(row: dict[str, Any], model_type: str, auto: str, folder: Path) -> None:
    try:
        _proven(row, model_type, auto, folder)
        row["verdict"] = "proven"
    except hlg.CheckpointError:  # is no refusal
        raise
    except ValueError as error:
        reason = f"{type(error).__name__}: {error}".replace(f"{folder.parent}/", "")
        row |= {"verdict": "refused", "reason": reason}


def _proven(row: dict[str, Any], model_type: str, auto: str, folder: Path) -> None:
    model = tiny_model(model_type, auto)
    row["class"] = type(model).__name__
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    hlg.save_relu_pretrained(model, folder)
    row["in_memory"] = f"{hlg.verify_relu_pretrained(model, folder):.1e}"
    loaded = load_saved(folder)  # what the commands verify and push make of a folder
    check_relu(loaded)
    check_card(folder)
    row["folder"] = f"{prove(loaded, folder).difference:.1e}"


if __name__ == "__main__":
    main()
