"""`audit`, `calibrate` and `sensitivity`: what a model does. Nothing is written."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from . import options as o
from .data import Data, batches, examples
from .models import loaded, resolved, with_hardness
from .work import FAILED, to_dict, working


def audit(
    model: o.Model,
    expect: Annotated[
        Literal["relu"] | None, typer.Option(help="Exit with 1 unless it is a ReLU network, nothing smooth in it.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Tell which activations a model really runs.

    It is run once, and its operations are watched, whatever its modules and config are called.

    \b
    Example:
      hf-lambda-gelu audit runs/sst2-relu --expect relu
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        report = hlg.audit(loaded(resolved(model), trust_remote_code))
        result.set(report, code=FAILED if expect == "relu" and not report.is_relu else 0)


def calibrate(
    model: o.Model,
    calibration: o.Calibration = None,
    column: o.Column = None,
    split: o.Split = "train",
    dataset_config: o.DatasetConfig = None,
    samples: o.Samples = 300,
    batch_size: o.BatchSize = 8,
    max_length: o.MaxLength = 128,
    device: o.Device = "cpu",
    tolerance: Annotated[
        float | None, typer.Option(min=1e-9, help="Also print λ at which ReLU changes a site's output by this fraction.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure how far each activation is from ReLU.

    It is measured on the calibration data. The table also has the λ at which ReLU is within 1 %. A GELU or SiLU model is
    measured at λ = 1.

    \b
    Example:
      hf-lambda-gelu calibrate runs/sst2 --calibration reviews.txt
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        data = Data(calibration, column, None, split, dataset_config, samples, batch_size, max_length)
        found, folder = examples(data), resolved(model)
        network = with_hardness(loaded(folder, trust_remote_code, device))
        report = hlg.calibrate(network, batches(found, data, network, folder, trust_remote_code))
        value, text = to_dict(report), str(report)
        if tolerance is not None:
            value["targets"] = targets = report.targets(tolerance)
            width = max(map(len, targets))
            text += f"\nλ for a relative error of {tolerance:g}"
            text += "".join(f"\n  {name:<{width}}  {target:>9.4g}" for name, target in targets.items())
        result.set(value, text)


def sensitivity(
    model: o.Model,
    calibration: o.Calibration = None,
    column: o.Column = None,
    label_column: o.LabelColumn = None,
    split: o.Split = "train",
    dataset_config: o.DatasetConfig = None,
    samples: o.Samples = 300,
    batch_size: o.BatchSize = 8,
    max_length: o.MaxLength = 128,
    device: o.Device = "cpu",
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure what it costs to make one activation ReLU.

    Each becomes ReLU alone, and is ranked by the change of the outputs, or with --label-column by that of the loss.

    \b
    Example:
      hf-lambda-gelu sensitivity runs/sst2 --calibration reviews.csv --column sentence --label-column label
    """
    with working(json, debug) as result:
        import hf_lambda_gelu as hlg

        data = Data(calibration, column, label_column, split, dataset_config, samples, batch_size, max_length)
        found, folder = examples(data), resolved(model)
        network = with_hardness(loaded(folder, trust_remote_code, device))
        result.set(hlg.sensitivity(network, batches(found, data, network, folder, trust_remote_code)))
