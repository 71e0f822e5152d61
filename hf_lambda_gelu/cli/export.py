"""`export onnx`: a checkpoint becomes a file for another runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .data import Data, batches, examples
from .models import loaded, resolved
from .work import working

export = typer.Typer(rich_markup_mode=None)


@export.callback()
def _common() -> None:
    """Write a checkpoint as a file for another runtime."""


@export.command()
def onnx(
    source: o.Source,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File to make. It appears when it is complete.")],
    encoder: Annotated[bool, typer.Option("--encoder", help="The encoder of an encoder-decoder model alone.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="One step of a decoder, with keys and values in and out.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Linear maps in 8-bit integers, with the ranges that --calibration shows.")
    ] = False,
    calibration: o.Calibration = None,
    column: o.Column = None,
    split: o.Split = "train",
    dataset_config: o.DatasetConfig = None,
    samples: o.Samples = 300,
    batch_size: o.BatchSize = 8,
    max_length: o.MaxLength = 128,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a checkpoint as an ONNX file.

    λ-GELU is folded first. What onnxruntime computes from the file is compared with torch, in two shapes, on the first batch
    of --calibration, or on inputs that are made up. The file takes the inputs that it was compared on.

    \b
    Examples:
      hf-lambda-gelu export onnx runs/sst2-relu sst2-relu.onnx
      hf-lambda-gelu export onnx runs/sst2-relu sst2-relu.onnx --calibration reviews.txt
      hf-lambda-gelu export onnx runs/sst2-relu sst2-int8.onnx --calibration reviews.txt --int8
      hf-lambda-gelu export onnx openai/whisper-tiny whisper-encoder.onnx --encoder --cache
      hf-lambda-gelu export onnx openai/whisper-tiny whisper-decoder.onnx --cache
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        from .inner import check_new_file

        check_new_file(Path(os.path.abspath(target)))
        data = Data(calibration, column, None, split, dataset_config, samples, batch_size, max_length)
        found = None if calibration is None and not int8 else examples(data)
        folder = resolved(source)
        model = loaded(folder, trust_remote_code).float()
        given = None if found is None else batches(found, data, model, folder, trust_remote_code)
        inputs = None if given is None else next(iter(given))
        result.set(hlg.export_onnx(model, target, inputs, encoder=encoder, cache=cache, int8=given if int8 else None))
