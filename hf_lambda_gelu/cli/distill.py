"""`distill`: a ReLU checkpoint learns from its smooth original's predictions, in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .data import Data, examples
from .models import resolved
from .transform import check_target_folder
from .work import working

Student = Annotated[str, typer.Argument(metavar="STUDENT", help="Folder of a ReLU checkpoint, or its Hub name.")]
Teacher = Annotated[
    str, typer.Argument(metavar="TEACHER", help="Folder or Hub name of the smooth model that it was made from.")
]
TrainingData = Annotated[
    str,
    typer.Option(
        "--data", metavar="DATA", help="Examples to learn on, without labels, of the kinds that --calibration takes."
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="TARGET", help="Folder to make. It appears when it is complete.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps, each on --batch-size examples.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Its peak; by default 2e-4, with --lora 1e-3. A tenth of the steps warm up.")
]
Lora = Annotated[bool, typer.Option("--lora", help="Train adapters of rank 16 and merge them; needs peft. Less memory.")]
Freeze = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE",
        help="Modules that do not learn, by the last part of their names; may be given again. Of a gated FFN with several "
        "ReLUs per gate: --freeze up_proj --freeze down_proj.",
    ),
]


def distill(
    student: Student,
    teacher: Teacher,
    data: TrainingData,
    output: Output,
    steps: Steps = 60,
    learning_rate: LearningRate = None,
    lora: Lora = False,
    freeze: Freeze = None,
    column: o.Column = None,
    split: o.Split = "train",
    dataset_config: o.DatasetConfig = None,
    samples: o.Samples = 10000,
    batch_size: o.BatchSize = 8,
    max_length: o.MaxLength = 256,
    device: o.Device = "cpu",
    base_model: o.BaseModel = None,
    dataset: o.Dataset = None,
    license: o.License = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Let a ReLU checkpoint learn from its smooth original.

    It trains for a few steps, on examples without labels. A fifth of these, 32 at most, is held out: how far the two models'
    predictions are apart is measured on these, before and after. The same command goes on where a killed one was.

    \b
    Example:
      hf-lambda-gelu distill smollm2-relu HuggingFaceTB/SmolLM2-135M --data paragraphs.txt --output smollm2-distilled
    """
    with working(json, debug) as result:
        check_target_folder(output)
        read = Data(data, column, None, split, dataset_config, samples, batch_size, max_length)
        found = examples(read)

        from .distilling import Distilling

        rate = learning_rate or (1e-3 if lora else 2e-4)
        card = {"base_model": base_model, "dataset": dataset, "license": license}
        frozen = tuple(freeze or ())
        work = Distilling(student, teacher, output, read, steps, rate, lora, frozen, device, card, trust_remote_code)
        result.set(*work.done(found, resolved(student), resolved(teacher)))
