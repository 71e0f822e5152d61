"""`export_onnx`: a network becomes an ONNX file that computes the same, in other sizes too. λ-GELU is folded first."""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...activation.module import hardness_sites
from ...measurement.forward import in_own_precision, measuring
from ...structure.loading import load_saved
from ...structure.offloading import check_not_offloaded
from ...structure.transaction import transaction
from ...surgery.folding import fold
from .comparison import compared, in_a_line, loaded, outputs, shapes_of
from .files import check_new_file, need_onnx, operators, remove, shapes, size_of, whole_file
from .inputs import Axes, check_axes, distinct, dynamic_axes, inputs_of, resized, sizes_of, smaller
from .report import ExportError, ExportReport, runtime_warnings

# The first that has Gelu as one operator. What later ones have besides (Attention in 23), fewer tools read.
OPSET = 20
_IN_ONE_FILE = 1_500_000_000  # bytes of weights; a protobuf message holds 2 GiB
_SIDES = ("height", "width")
_LOGS = ("torch.onnx", "onnxscript", "onnx_ir")


@transaction
def export_onnx(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    inputs: Any = None,
    *,
    encoder: bool = False,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> ExportReport:
    """Writes a network as an ONNX file, in opset 20, and compares onnxruntime with torch on inputs of two shapes.

    λ-GELU is folded first, on a copy, so that the file has the operator Gelu, or what the stock activation consists of. One
    forward pass is exported, in eval mode and without a key-value cache. The model stays as it was.

    Args:
        model: a network in float32; or the folder of a saved checkpoint, which is loaded in float32, and of which no code
            runs.
        path: the file to make. An existing one is refused.
        inputs: what forward takes, as a tokenizer or an image processor returns it. They become the file's inputs, and are
            what it is checked on. By default a small batch made to fit a transformers model.
        encoder: export the encoder of an encoder-decoder model alone.
        dynamic: input → {dimension: name}, the sizes that may change. By default those of examples, tokens and samples, and
            height and width where the model and its file take other sizes than the config's; where the file does not
            (Swin's windows), they are fixed, with a warning in the report. `{}`: all are fixed.

    Returns:
        What was written, and the difference to torch.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing (`pip install 'hf_lambda_gelu[onnx]'`).
        ValueError: `path` exists or cannot be written, no inputs can be made or they do not fit, a model in another dtype,
            or `dynamic` names what there is not.
        CheckpointError: the folder is no checkpoint.
        FoldError: λ cannot go into the weights.
        ExportError: torch cannot export the network or keep a size dynamic, onnxruntime cannot run the file, or it computes
            something else (beyond 2e-5 of the largest output).

    Nothing is written in any of these cases.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> report = hlg.export_onnx("sst2-relu", "sst2-relu.onnx")
        >>> report.inputs["input_ids"], report.operators["Relu"]
        (('batch', 'sequence'), 12)
    """
    need_onnx("export_onnx")
    target = Path(os.path.abspath(path))
    check_new_file(target)
    with whole_file(target) as made:
        whole: Any = model if isinstance(model, nn.Module) else load_saved(model).float()
        network = _encoder(whole) if encoder else whole
        _check_floats(network)
        with measuring(network), in_own_precision(network):
            batch = inputs_of(network, inputs, whole if encoder else None)
            task = _Task(network, *_folded(network, batch), batch, outputs(network, batch), made, target)
            if dynamic is not None:
                return task.export(check_axes(dynamic, batch))
            return _with_sides_or_without(task, dynamic_axes(network, batch))


@dataclass(frozen=True)
class _Task:
    """One network that becomes one file.

    Attributes:
        model: what the caller gave. The file is compared with this one.
        exported: the same function without λ-GELU: a folded copy, or `model` itself.
        folded: site → λ that went into the weights.
        batch, expected: the inputs, and what `model` returns on them, by name.
        made, target: where the file is made, and where it will be.
    """

    model: nn.Module
    exported: nn.Module
    folded: dict[str, float]
    batch: dict[str, Tensor]
    expected: dict[str, Tensor]
    made: Path
    target: Path

    def export(self, axes: Axes) -> ExportReport:
        """Make the file with sizes that may change, and check it.

        Raises:
            ExportError: see `export_onnx`.
        """
        remove(self.made)
        traced = resized(self.batch, axes, distinct(self.model, self.batch, axes))
        with measuring(self.exported):
            _write(self.exported, self.made, traced, axes, list(self.expected))
        fed = [self.batch]
        if any(axes.values()):
            fed.append(resized(self.batch, axes, smaller(self.model, self.batch, axes)))
        ready = loaded(self.made)
        return ExportReport(
            path=self.target,
            size=size_of(self.made),
            opset=OPSET,
            inputs=shapes(ready.get_inputs()),
            outputs=shapes(ready.get_outputs()),
            operators=operators(self.made),
            folded=self.folded,
            checked=tuple(shapes_of(batch) for batch in fed),
            difference=max(compared(ready, self.model, batch) for batch in fed),
            warnings=runtime_warnings(self.exported),
        )


def _with_sides_or_without(task: _Task, axes: Axes) -> ExportReport:
    """The export; if it fails with images of any height and width, the export with those of the inputs."""
    try:
        return task.export(axes)
    except ExportError:
        fixed = {name: {dim: axis for dim, axis in named.items() if axis not in _SIDES} for name, named in axes.items()}
        if fixed == axes:
            raise
        report = task.export(fixed)
        sides = " × ".join(str(size) for axis, size in sizes_of(task.batch, axes).items() if axis in _SIDES)
        text = f"images must be of {sides}: with others the file would fail or compute something else than torch"
        return replace(report, warnings=(text, *report.warnings))


def _encoder(model: Any) -> nn.Module:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has no encoder beside a decoder: leave encoder=True out")
    found: nn.Module = model.get_encoder()
    return found


def _check_floats(model: nn.Module) -> None:
    check_not_offloaded(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device, where weights have no values: load the model first")
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}: export in float32, which onnxruntime computes everywhere (model.float())"
            )


def _folded(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, float]]:
    """The model, or where it has λ-GELU a copy with λ in the weights; and the λ of each site."""
    if not hardness_sites(model):
        return model, {}
    stock = copy.deepcopy(model)
    return stock, fold(stock, dict(batch)).sites


def _write(model: nn.Module, path: Path, batch: dict[str, Tensor], axes: Axes, names: list[str]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with _quietly(), torch.no_grad():
        try:
            torch.onnx.export(
                model,
                (),
                str(path),
                kwargs=batch,
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=axes,
                external_data=size > _IN_ONE_FILE,
                verbose=False,
            )
        except Exception as error:  # torch.onnx's own classes, and whatever a forward raises when it is traced
            raise ExportError(_refused(model, error, axes)) from error


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


@contextmanager
def _quietly() -> Iterator[None]:
    """Without logs and warnings, which tell of packages that nobody needs, and the graphs that torch prints on failures."""
    levels = {name: logging.getLogger(name).level for name in _LOGS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
