"""`export_onnx`: a network becomes an ONNX file that computes the same, in other sizes too. λ-GELU is folded first."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat import pytree
from ..activation.module import hardness_sites
from ..measurement.difference import difference
from ..measurement.forward import call, in_own_precision, measuring, same_random_numbers
from ..reports import span
from ..structure.config import config_of
from ..structure.loading import load_saved
from ..structure.offloading import check_not_offloaded
from ..structure.transaction import transaction
from ..surgery.folding import fold
from .onnx_files import check_new_file, need_onnx, operators, run, session, shapes, size_of, whole_file
from .onnx_inputs import Axes, check_axes, distinct, dynamic_axes, inputs_of, resized, smaller

# The first that has Gelu as one operator. What later ones have besides (Attention in 23), fewer tools read.
OPSET = 20
# max |onnxruntime − torch| relative to the largest output: both sum in fp32, in orders of their own
TOLERANCE = 1e-4
_IN_ONE_FILE = 1_500_000_000  # bytes of weights; a protobuf message holds 2 GiB
_ACTIVATIONS = ("Relu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSwish", "Mish")


class ExportError(RuntimeError):
    """A network did not become an ONNX file that computes the same; the message says what happened. Nothing was written.

    Examples:
        >>> try:
        ...     hlg.export_onnx(model, "model.onnx")  # import hf_lambda_gelu as hlg
        ... except hlg.ExportError as error:
        ...     print(error)  # what torch or onnxruntime refused, what to do
    """


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote. Printing it gives the summary.

    Attributes:
        path: of the file. Weights of 1.5 GB and more lie beside it, in a file that ends in `.onnx.data`.
        size: bytes, of both.
        opset: version of ONNX's operators.
        inputs, outputs: name → sizes, a word where the size may change.
        operators: name → how many there are in the graph.
        folded: sites whose λ went into the weights, with that λ; empty for a network without λ-GELU.
        checked: the shapes of the inputs on which onnxruntime and torch were compared.
        difference: max |onnxruntime − torch| over these, relative to the largest value of each output.
        warnings: runtimes that would not run what the config says.
    """

    path: Path
    size: int
    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    operators: dict[str, int]
    folded: dict[str, float]
    checked: tuple[dict[str, tuple[int, ...]], ...]
    difference: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = [f"{count} {name}" for name, count in self.operators.items() if name in _ACTIVATIONS]
        lines = [
            f"{self.path}: {self.size / 1e6:.1f} MB, opset {self.opset}, {sum(self.operators.values())} operators"
            + (f", of these {', '.join(found)}" if found else ""),
            *(f"  {name}: {_sizes(shape)}" for name, shape in self.inputs.items()),
            *(f"  → {name}: {_sizes(shape)}" for name, shape in self.outputs.items()),
        ]
        if self.folded:
            lines.append(f"  λ folded into the weights at {len(self.folded)} sites: {span(list(self.folded))}")
        fed = " and ".join(_sizes(next(iter(shapes.values()))) for shapes in self.checked)
        lines.append(f"  as in torch within {self.difference:.1e} (relative), on inputs of {fed}")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


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
        model: a network in float32; or the folder of a saved checkpoint, of which no code runs.
        path: the file to make. An existing one is refused.
        inputs: what forward takes, as a tokenizer or an image processor returns it. They become the file's inputs, and are
            what it is checked on. By default a small batch made to fit a transformers model.
        encoder: export the encoder of an encoder-decoder model alone.
        dynamic: input → {dimension: name}, the sizes that may change. By default those of examples, tokens and samples, and
            height and width where the model takes other sizes than the config's. `{}`: all are fixed.

    Returns:
        What was written, and the difference to torch.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing (`pip install 'hf_lambda_gelu[onnx]'`).
        ValueError: `path` exists or cannot be written, no inputs can be made or they do not fit, a model in another dtype, or
            `dynamic` names what there is not.
        CheckpointError: the folder is no checkpoint.
        FoldError: λ cannot go into the weights.
        ExportError: torch cannot export the network or keep a size dynamic, onnxruntime cannot run the file, or it computes
            something else (beyond 1e-4 of the largest output).

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
    network: Any = model if isinstance(model, nn.Module) else load_saved(model)
    whole = network
    if encoder:
        network = _encoder(whole)
    _check_floats(network)
    with measuring(network), in_own_precision(network):
        batch = inputs_of(network, inputs, whole if encoder else None)
        expected = _outputs(network, batch)
        axes = dynamic_axes(network, batch) if dynamic is None else check_axes(dynamic, batch)
        exported, folded = _folded(network, batch)
        with measuring(exported), whole_file(target) as made:
            _export(exported, made, resized(batch, axes, distinct(network, batch, axes)), axes, list(expected))
            other = resized(batch, axes, smaller(network, batch, axes))
            fed = [batch, other] if any(axes.values()) else [batch]
            return _checked(network, made, target, fed, folded, _warnings(exported))


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


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What forward returns, by name, in the order in which torch.export flattens it."""
    with torch.no_grad(), same_random_numbers(model):
        output = call(model, {name: value.clone() for name, value in batch.items()})
    named: dict[str, Tensor] = {}
    for name, value in output.items():
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        name = f"output_{name}" if name.isdigit() else name
        named |= {name if len(leaves) == 1 else f"{name}_{index}": leaf for index, leaf in enumerate(leaves)}
    return named


def _folded(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, float]]:
    """The model, or where it has λ-GELU a copy with λ in the weights; and the λ of each site."""
    if not hardness_sites(model):
        return model, {}
    stock = copy.deepcopy(model)
    return stock, fold(stock, dict(batch)).sites


def _export(model: nn.Module, path: Path, batch: dict[str, Tensor], axes: Axes, names: list[str]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # what the caller calls an axis is what the file calls it
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
    reason = " ".join(str(cause).split())[:400]
    sizes = sorted({axis for named in axes.values() for axis in named.values()})
    advice = f"if it is about a size, keep that one fixed: dynamic={{…}} names those that change, now {', '.join(sizes)}"
    return (
        f"torch.onnx.export does not take {type(model).__name__}: {type(cause).__name__}: {reason}. "
        f"{advice if sizes else 'All sizes are fixed already'}"
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch.onnx's log, which tells of packages that are not needed, and its warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _checked(
    model: nn.Module,
    made: Path,
    target: Path,
    fed: list[dict[str, Tensor]],
    folded: dict[str, float],
    warned: tuple[str, ...],
) -> ExportReport:
    """The report on the file, once onnxruntime computes from it what the model computes."""
    worst = 0.0
    try:
        ready = session(made)
    except Exception as error:  # onnxruntime's classes derive from Exception alone
        raise ExportError(f"onnxruntime does not load what torch exported: {error}") from error
    for batch in fed:
        shapes_of = {name: tuple(value.shape) for name, value in batch.items()}
        expected = [value.detach().cpu() for value in _outputs(model, batch).values()]
        try:
            got = run(ready, batch)
        except Exception as error:
            raise ExportError(
                f"onnxruntime fails on inputs of {shapes_of}: {' '.join(str(error).split())[:400]}. If a size cannot change, "
                "keep it fixed by dynamic={…}"
            ) from error
        found = difference(expected, got)
        if not found <= TOLERANCE:
            raise ExportError(
                f"on inputs of {shapes_of} the outputs of onnxruntime differ from torch's by {found:.2g} (relative), more "
                f"than rounding ({TOLERANCE:g}): the file would be another network"
            )
        worst = max(worst, found)
    return ExportReport(
        path=target,
        size=size_of(made),
        opset=OPSET,
        inputs=shapes(ready.get_inputs()),
        outputs=shapes(ready.get_outputs()),
        operators=operators(made),
        folded=folded,
        checked=tuple({name: tuple(value.shape) for name, value in batch.items()} for batch in fed),
        difference=worst,
        warnings=warned,
    )


def _warnings(model: nn.Module) -> tuple[str, ...]:
    """What is to be known of runtimes that read checkpoints by their architecture."""
    config = config_of(model)
    if getattr(config, "model_type", None) != "llama" or getattr(config, "hidden_act", "silu") in ("silu", "swish"):
        return ()
    return (
        f"of a Llama checkpoint llama.cpp runs SiLU whatever the config says ({config.hidden_act}), and vLLM's own Llama takes "
        "SiLU alone: neither runs this network. This file and transformers do",
    )


def _sizes(shape: tuple[int | str, ...]) -> str:
    return " × ".join(map(str, shape))
