"""`convert`, `relu-ize` and `fold`: a checkpoint becomes another, in a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import options as o
from .data import Data, batches, examples
from .models import loaded, processors, resolved, with_hardness, without_weights
from .work import Result, UsageError, working

_NO_DATA = (
    "{} runs the model: add --calibration with examples like those that it will meet, such as a text file with a line each. "
    "A few hundred do, without labels"
)


def convert(
    source: o.Source,
    target: o.Target,
    init_hardness: o.InitHardness = 1.0,
    copy: o.Copy = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make a λ-GELU checkpoint of a GELU or SiLU one.

    At λ = 1 it computes what the source computes. The weights are not loaded; tokenizer, processor and card come along.

    \b
    Example:
      hf-lambda-gelu convert google-bert/bert-base-uncased models/bert-lambda
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        check_target_folder(target)
        folder = resolved(source)
        made = hlg.convert_checkpoint(folder, target, init_hardness, link=not copy, trust_remote_code=trust_remote_code)
        result.set(made)


def relu_ize(
    source: o.Source,
    target: o.Target,
    calibration: o.Calibration = None,
    compensate: o.Compensate = None,
    hinges: o.Hinges = 1,
    budget: o.Budget = None,
    as_llama: o.AsLlama = False,
    column: o.Column = None,
    label_column: o.LabelColumn = None,
    split: o.Split = "train",
    dataset_config: o.DatasetConfig = None,
    samples: o.Samples = 300,
    batch_size: o.BatchSize = 8,
    max_length: o.MaxLength = 128,
    device: o.Device = "cpu",
    tolerance: o.Tolerance = 0.005,
    force: o.Force = False,
    stream: o.Stream = False,
    copy: o.Copy = False,
    base_model: o.BaseModel = None,
    dataset: o.Dataset = None,
    license: o.License = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make a ReLU checkpoint of a λ-GELU one.

    Stock transformers loads it. Without --calibration the weights are not loaded, and gates must be hard. With it the
    change of the outputs is measured, a GELU model converted first; --compensate refits the weights, so that gates may be
    soft; --stream keeps one block of them in memory. With --hinges or --budget layers get wider, and nearer to the smooth.

    \b
    Examples:
      hf-lambda-gelu relu-ize runs/sst2 runs/sst2-relu
      hf-lambda-gelu relu-ize textattack/bert-base-uncased-SST-2 bert-relu \\
          --calibration reviews.txt --compensate least_squares
      hf-lambda-gelu relu-ize models/vit vit-relu --calibration pictures/ --compensate least_squares --stream
      hf-lambda-gelu relu-ize models/qwen2 qwen-relu --calibration texts.txt --compensate least_squares --hinges 2 --as-llama
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        details = hlg.CardDetails(base_model=base_model, dataset=dataset, license=license)
        _check_data(target, calibration, compensate, stream, wider := hinges != 1 or budget is not None or as_llama)
        kept: dict[str, Any] = {"details": details, "trust_remote_code": trust_remote_code}
        how: dict[str, Any] = {"force": force, "tolerance": tolerance, "compensate": compensate}
        data = Data(calibration, column, label_column, split, dataset_config, samples, batch_size, max_length)
        found, folder = None if calibration is None else examples(data), resolved(source)
        if stream or (found is None and not wider):
            if found is not None:
                model = without_weights(folder, target, trust_remote_code)
                how |= {"calibration": batches(found, data, model, folder, trust_remote_code), "device": device}
            return result.set(hlg.relu_ize_checkpoint(folder, target, **how, **kept, link=not copy))
        model = with_hardness(loaded(folder, trust_remote_code, device, as_llama))
        how |= {} if found is None else {"calibration": batches(found, data, model, folder, trust_remote_code)}
        report = hlg.relu_ize(model, **how, hinges=hinges, budget=budget)
        saved = hlg.save_relu_pretrained(model, target, processor=processors(folder, trust_remote_code), **kept)
        _saved(result, report, saved)


def fold(
    source: o.Source,
    target: o.Target,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make a stock GELU checkpoint of a λ-GELU one.

    λ goes into the weights, and the function stays.

    \b
    Example:
      hf-lambda-gelu fold runs/sst2 runs/sst2-folded
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        from .inner import settle_code, whole_folder

        check_target_folder(target)
        folder = resolved(source)
        model = loaded(folder, trust_remote_code)
        report = hlg.fold(model)
        saved = Path(os.path.abspath(target))
        with whole_folder(saved) as temporary:
            model.save_pretrained(temporary)
            for processor in processors(folder, trust_remote_code):
                processor.save_pretrained(temporary)
            settle_code(temporary, trust_remote_code)
        _saved(result, report, saved)


def _saved(result: Result, report: Any, folder: Path) -> None:
    """What is printed of a model that was changed and saved."""
    result.set({"folder": folder, "model": report}, f"{report}\nsaved in {str(folder)!r}")


def _check_data(target: Path, calibration: str | None, compensate: str | None, stream: bool, wider: bool) -> None:
    """UsageError for options that need data, or do not go together; ValueError unless the folder can be made."""
    check_target_folder(target)
    if stream and wider:
        raise UsageError("--stream refits layers as they are: leave it out, or --hinges, --budget and --as-llama")
    if (compensate is not None or stream) and calibration is None:
        raise UsageError(_NO_DATA.format("--stream" if compensate is None else f"--compensate {compensate}"))


def check_target_folder(target: Path) -> None:
    """Before any work: ValueError unless the folder can be made."""
    from .inner import check_new

    check_new(Path(os.path.abspath(target)))
