"""`export_onnx`: a network becomes an ONNX file that computes the same, in other sizes too. λ-GELU is folded first."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...activation.module import hardness_sites
from ...measurement.batches import model_batches
from ...measurement.forward import in_own_precision, measuring
from ...structure.loading import load_saved
from ...structure.offloading import check_not_offloaded
from ...structure.other_runtimes import runtime_warnings
from ...structure.transaction import transaction
from ...surgery.folding import fold
from .cache import Step, steps, with_cache
from .comparison import compared, loaded, outputs, shapes_of
from .files import check_new_file, need_onnx, operators, remove, shapes, size_of, weights_of, whole_file
from .inputs import Axes, Feed, check_axes, dynamic_axes, feed, inputs_of, sizes_of
from .int8 import fed_by, quantise, warnings_of
from .report import ExportError, ExportReport
from .tracing import OPSET, write

_SIDES = ("height", "width")


@transaction
def export_onnx(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    inputs: Any = None,
    *,
    encoder: bool = False,
    cache: bool = False,
    int8: Iterable[Any] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Writes a network as an ONNX file, in opset 20, and compares onnxruntime with torch on inputs of two shapes.

    λ-GELU is folded first, on a copy, so that the file has the operator Gelu, or what the stock activation consists of. One
    forward pass is exported, in eval mode. The model stays as it was.

    Args:
        model: a network in float32; or the folder of a saved checkpoint, which is loaded in float32.
        path: the file to make. An existing one is refused.
        inputs: what forward takes, as a tokenizer or an image processor returns it. They become the file's inputs, and are
            what it is checked on. By default a small batch made to fit a transformers model.
        encoder: export the encoder of an encoder-decoder model alone.
        cache: export one step of a decoder, with the keys and values of what came before as inputs and those of all so far
            as outputs; with `encoder`, the encoder and the keys and values that the decoder's layers make of its output.
        int8: batches like those that the network will meet, some hundreds of examples, kept in memory. Its linear maps then
            compute in 8-bit integers, in the ranges that activations have on them. `inputs` are the first, by default.
        dynamic: input → {dimension: name}, the sizes that may change. By default those of examples, tokens and samples, and
            height and width where the model and its file take other sizes than the config's; where the file does not
            (Swin's windows), they are fixed, with a warning in the report. `{}`: all are fixed.
        trust_remote_code: run code of its own that the folder has; without it such a folder is refused.

    Returns:
        What was written, and the difference to torch.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing (`pip install 'hf_lambda_gelu[onnx]'`).
        ValueError: `path` exists or cannot be written, no inputs can be made or they do not fit, a model in another dtype,
            `dynamic` names what there is not, batches of `int8` do not fit the file, or it comes with `cache`.
        CheckpointError, FoldError: no checkpoint, or one with code that is not trusted; λ cannot go into the weights.
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
    _check_together(cache, dynamic, int8)
    with whole_file(target) as made:
        whole: Any = model if isinstance(model, nn.Module) else _of_a_folder(model, trust_remote_code)
        _check_floats(whole)
        with measuring(whole), in_own_precision(whole):
            asked = _Asked(encoder, cache, dynamic, made, target)
            return _exported(whole, inputs, asked) if int8 is None else _in_integers(whole, inputs, int8, asked)


def _of_a_folder(folder: str | os.PathLike[str], trust_remote_code: bool) -> nn.Module:
    model: nn.Module = load_saved(folder, trust_remote_code=trust_remote_code)
    return model.float()


class _Asked(NamedTuple):
    """What `export_onnx` was asked for, and where the file is made and will be."""

    encoder: bool
    cache: bool
    dynamic: Mapping[str, Mapping[int, str]] | None
    made: Path
    target: Path


def _check_together(cache: bool, dynamic: Any, int8: Any) -> None:
    if cache and dynamic is not None:
        raise ValueError("with cache=True the names of the sizes are given: leave dynamic=… out")
    if cache and int8 is not None:
        raise ValueError(
            "a decoder's step with its keys and values is exported in float alone: leave cache=True or int8=… out"
        )


def _exported(whole: Any, inputs: Any, asked: _Asked) -> ExportReport:
    encoder, cache, dynamic, made, target = asked
    part = _encoder(whole) if encoder else whole
    network = whole if cache else part
    batch = inputs_of(network, inputs, whole if encoder and not cache else None)
    outputs(network, batch)  # a ValueError if they do not fit
    stock, folded = _folded(network, batch)
    warned = runtime_warnings(stock)
    with measuring(stock):
        if cache:
            network, own = with_cache(whole, batch, encoder)
            stock, batch = (network if stock is whole else with_cache(stock, batch, encoder)[0]), own
        task = _Task(network, stock, folded, warned, made, target)
        if isinstance(network, Step):
            return task.export(steps(network, batch))
        if dynamic is not None:
            return task.export(feed(network, batch, check_axes(dynamic, batch)))
        return _with_sides_or_without(task, batch, dynamic_axes(network, batch))


def _in_integers(whole: Any, inputs: Any, int8: Iterable[Any], asked: _Asked) -> ExportReport:
    """The export in float, and then the file of 8-bit integers in its place."""
    made, batches = asked.made, list(model_batches(_encoder(whole) if asked.encoder else whole, int8))
    report = _exported(whole, batches[0] if inputs is None else inputs, asked)
    fed = [fed_by(batch, index, report.inputs) for index, batch in enumerate(batches)]
    source = made.parent / "float" / made.name
    source.parent.mkdir()
    for file in (made, weights_of(made)):
        if file.exists():
            os.replace(file, source.parent / file.name)
    found = quantise(source, made, fed)
    warned = (*warnings_of(found), *report.warnings)
    return replace(report, size=size_of(made), operators=operators(made), int8=found, warnings=warned)


@dataclass(frozen=True)
class _Task:
    """One network that becomes one file.

    Attributes:
        model: what the caller gave. The file is compared with this one.
        exported: the same function without λ-GELU: a folded copy, or `model` itself.
        folded: site → λ that went into the weights.
        warned: what is to be known of other runtimes.
        made, target: where the file is made, and where it will be.
    """

    model: nn.Module
    exported: nn.Module
    folded: dict[str, float]
    warned: tuple[str, ...]
    made: Path
    target: Path

    def export(self, fed: Feed) -> ExportReport:
        """Make the file with sizes that may change, and check it.

        Raises:
            ExportError: see `export_onnx`.
        """
        remove(self.made)
        write(self.exported, self.made, fed, list(outputs(self.model, fed.checked[0])))
        ready = loaded(self.made)
        return ExportReport(
            path=self.target,
            size=size_of(self.made),
            opset=OPSET,
            inputs=shapes(ready.get_inputs()),
            outputs=shapes(ready.get_outputs()),
            operators=operators(self.made),
            folded=self.folded,
            checked=tuple(shapes_of(batch) for batch in fed.checked),
            difference=max(compared(ready, self.model, batch) for batch in fed.checked),
            warnings=self.warned,
        )


def _with_sides_or_without(task: _Task, batch: dict[str, Tensor], axes: Axes) -> ExportReport:
    """The export; if it fails with images of any height and width, the export with those of the inputs."""
    try:
        return task.export(feed(task.model, batch, axes))
    except ExportError:
        fixed = {name: {dim: axis for dim, axis in named.items() if axis not in _SIDES} for name, named in axes.items()}
        if fixed == axes:
            raise
        report = task.export(feed(task.model, batch, fixed))
        sides = " × ".join(str(size) for axis, size in sizes_of(batch, axes).items() if axis in _SIDES)
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
