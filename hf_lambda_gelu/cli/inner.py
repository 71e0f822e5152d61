"""What the command line takes from inside the package, beyond its public names.

Imports torch: commands import it when run.
"""

from __future__ import annotations

from ..checkpoints.card import REPORT_NAME
from ..checkpoints.carried_code import settle_code
from ..checkpoints.folders import check_new, unfinished_folder, whole_folder
from ..checkpoints.hub import check_processor, check_target
from ..checkpoints.on_disk_files import Source
from ..checkpoints.published_files import published_files
from ..checkpoints.save import check_relu
from ..checkpoints.verify import check_as_proven
from ..downstream.onnx.files import check_new_file
from ..measurement.batches import model_batches
from ..measurement.forward import call, main_output
from ..measurement.output_rows import output_rows
from ..structure.loading import check_trusted, load_saved
from ..structure.own_code import references
from ..structure.scratch import scratch_folder
from ..structure.smooth_activations import smooth_modules

__all__ = [
    "REPORT_NAME",
    "Source",
    "call",
    "check_as_proven",
    "check_new",
    "check_new_file",
    "check_processor",
    "check_relu",
    "check_target",
    "check_trusted",
    "load_saved",
    "main_output",
    "model_batches",
    "output_rows",
    "published_files",
    "references",
    "scratch_folder",
    "settle_code",
    "smooth_modules",
    "unfinished_folder",
    "whole_folder",
]
