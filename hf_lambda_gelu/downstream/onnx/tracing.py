"""`torch.onnx.export`, without its noise, and with its errors in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cache import EncoderStep, InOneMapping, Step
from .comparison import in_a_line
from .inputs import Axes, Feed
from .quiet import quietly
from .report import ExportError

# The first that has Gelu as one operator. What later ones have besides (Attention in 23), fewer tools read.
OPSET = 20
IN_ONE_FILE = 1_500_000_000  # bytes of weights; a protobuf message holds 2 GiB


def write(model: nn.Module, path: Path, fed: Feed, outputs: list[str]) -> None:
    """Make the file; ExportError if torch does not.

    Args:
        outputs: their names, in order.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    takes: dict[str, Any] = {"kwargs": fed.traced, "dynamic_shapes": fed.axes}
    if isinstance(model, (Step, EncoderStep)):
        takes = {"kwargs": {"inputs": fed.traced}, "dynamic_shapes": {"inputs": fed.axes}, "input_names": list(fed.traced)}
    with quietly(), torch.no_grad():
        try:
            torch.onnx.export(
                InOneMapping(model).eval() if "input_names" in takes else model,
                (),
                str(path),
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                external_data=size > IN_ONE_FILE,
                verbose=False,
                **takes,
            )
        except Exception as error:  # torch.onnx's own classes, and whatever a forward raises when it is traced
            raise ExportError(_refused(model, error, fed.axes)) from error


def _refused(model: nn.Module, error: Exception, axes: Axes) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    sizes = sorted({axis for named in axes.values() for axis in named.values()})
    advice = f"If it is about a size, keep that one fixed: dynamic={{…}} names those that change, now {', '.join(sizes)}"
    return (
        f"torch.onnx.export does not take {type(model).__name__}: {type(cause).__name__}: {in_a_line(cause)}. "
        f"{advice if sizes else 'All sizes are fixed already'}"
    )
