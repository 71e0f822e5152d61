"""`convert`, `relu-ize` and `fold`: a checkpoint becomes another, in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options as o
from .data import Batches, Data, batches, examples
from .models import loaded, processors, resolved, with_hardness, without_weights
from .shared import check_alone, shared
from .work import Result, UsageError, working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    Stock transformers loads it. Without --calibration gates must be hard, and the weights are not loaded. With it a GELU
    model is converted first, and the change of the outputs is measured; --compensate refits the weights, so that gates may
    be soft; --stream keeps one block of them in memory. --hinges and --budget make layers wider, and the network nearer.

    \b
    Examples:
      hf-lambda-gelu relu-ize runs/sst2 runs/sst2-relu
      hf-lambda-gelu relu-ize textattack/bert-base-uncased-SST-2 bert-relu --calibration reviews.txt --compensate bias
      hf-lambda-gelu relu-ize models/vit vit-relu --calibration pictures/ --compensate least_squares --hinges 2 --stream
      hf-lambda-gelu relu-ize models/qwen2 qwen-relu --calibration texts.txt --compensate least_squares --hinges 2 --as-llama
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        if calibration is None or stream:
            check_alone("--stream" if stream else "what needs no data")
        check_target_folder(target)
        details = hlg.CardDetails(base_model=base_model, dataset=dataset, license=license)
        _check_data(calibration, compensate, stream, wider := hinges != 1 or budget is not None or as_llama, as_llama)
        width: dict[str, Any] = {"hinges": hinges, "budget": budget}
        kept: dict[str, Any] = {"details": details, "trust_remote_code": trust_remote_code}
        how: dict[str, Any] = {"force": force, "tolerance": tolerance, "compensate": compensate}
        data = Data(calibration, column, label_column, split, dataset_config, samples, batch_size, max_length)
        found, folder = None if calibration is None else examples(data), resolved(source)
        if stream or (found is None and not wider):
            if found is not None:
                model = without_weights(folder, target, trust_remote_code)
                how |= {"calibration": batches(found, data, model, folder, trust_remote_code)}
            return result.set(hlg.relu_ize_checkpoint(folder, target, device=device, **how, **width, **kept, link=not copy))
        made = None if found is None else partial(batches, found, data)
        _relu_ize_in_memory(result, (folder, target, device), made, how | width, kept, as_llama)


def _relu_ize_in_memory(
    result: Result,
    places: tuple[Path, Path, str],
    found: Callable[[PreTrainedModel, Path, bool], Batches] | None,
    how: dict[str, Any],
    kept: dict[str, Any],
    as_llama: bool,
) -> None:
    """`relu_ize` and `save_relu_pretrained`, by all processes that were started; the first one saves and prints.

    Args:
        places: source, target and device.
        found: makes batches of the examples, for the model in that folder; None without any.
        how, kept: options of the two.
        as_llama: whether the model becomes the Llama of the same function first.
    """
    import hf_lambda_gelu as hlg

    (folder, target, device), trusted = places, kept["trust_remote_code"]
    with shared(device) as share:
        model = with_hardness(loaded(folder, trusted, share.device, as_llama))
        if found is not None:
            how["calibration"] = share.of(found(model, folder, trusted))
        report = hlg.relu_ize(model, **how, processes="all")
        result.silent = share.rank > 0
        if share.rank == 0:
            saved = hlg.save_relu_pretrained(model, target, processor=processors(folder, trusted), **kept)
            result.set({"folder": saved, "model": report}, f"{report}\nsaved in {str(saved)!r}")


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
        result.set({"folder": saved, "model": report}, f"{report}\nsaved in {str(saved)!r}")


def _check_data(calibration: str | None, compensate: str | None, stream: bool, wider: bool, as_llama: bool) -> None:
    """UsageError for options that need data, or do not go together."""
    if stream and as_llama:
        raise UsageError("--as-llama needs the model in memory: leave out --stream, or make the Llama first by hlg.as_llama")
    if (compensate is not None or (stream and not wider)) and calibration is None:
        raise UsageError(_NO_DATA.format("--stream" if compensate is None else f"--compensate {compensate}"))


def check_target_folder(target: Path) -> None:
    """Before any work: ValueError unless the folder can be made."""
    from .inner import check_new

    check_new(Path(os.path.abspath(target)))
