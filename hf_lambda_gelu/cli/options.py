"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved checkpoint, or a Hub name.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a saved checkpoint, or a Hub name.")]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to make. It appears when it is complete.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies beside the model. Only for models that you trust.")
]
InitHardness = Annotated[float, typer.Option(help="λ to start from; 1 keeps the function.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy weight files in place of hard links to the source's.")]
Force = Annotated[bool, typer.Option("--force", help="Replace gates that are still soft: the naive swap.")]
Tolerance = Annotated[float, typer.Option(help="The hardness tolerance ε that the model was trained for.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cuda.")]

Calibration = Annotated[
    str | None,
    typer.Option(
        help="Examples like those that the model will meet: a text file (a line each), a csv, json, jsonl or parquet file, "
        "a folder of images, a .safetensors or .npy file of ready inputs, or a dataset's folder or Hub name.",
        metavar="DATA",
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the text or image; found where there is only one.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label: the loss is measured too.")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
DatasetConfig = Annotated[str | None, typer.Option("--config", help="Configuration of the dataset.")]
Samples = Annotated[int, typer.Option(min=1, help="At most so many examples, drawn at random with a fixed seed.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Texts are cut to so many tokens.")]
Compensate = Annotated[
    Literal["least_squares", "bias"] | None,
    typer.Option(help="Refit the linear map after each activation, from the calibration data without labels."),
]
Hinges = Annotated[
    int,
    typer.Option(
        help="ReLUs for each gate, in layers so many times as wide: 1 to 4 with --compensate, 4 to 6 without data."
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(help="In place of --hinges: the width over the width before, such as 1.5, spent where it helps most."),
]
AsLlama = Annotated[
    bool,
    typer.Option(
        "--as-llama",
        help="Save a Mistral's or Qwen2's weights as the Llama of the same function, whose gates can have biases.",
    ),
]

Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Keep one block of the model's weights in memory, and go on where a killed command was: for any size.",
    ),
]

BaseModel = Annotated[str | None, typer.Option(help="For the card: Hub name of the pretrained model.")]
Dataset = Annotated[str | None, typer.Option(help="For the card: Hub name of the training data.")]
License = Annotated[str | None, typer.Option(help="For the card: licence identifier, that of the base model.")]
