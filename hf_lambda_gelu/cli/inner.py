"""What the command line takes from inside the package, beyond its public names.

Imports torch: commands import it when run.
"""

from __future__ import annotations

from ..batches import main_output, model_batches, rows, token_mask
from ..export import REPORT_NAME, check_relu
from ..folders import check_new, whole_folder
from ..hub import check_processor, check_target, load_saved

__all__ = [
    "REPORT_NAME",
    "check_new",
    "check_processor",
    "check_relu",
    "check_target",
    "load_saved",
    "main_output",
    "model_batches",
    "rows",
    "token_mask",
    "whole_folder",
]
