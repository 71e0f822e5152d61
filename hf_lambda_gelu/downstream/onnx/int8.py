"""A float ONNX file becomes one whose products with weights are of 8-bit integers, by onnxruntime's static quantisation.

Only these products are quantised: what they take up is rounded to 8 bits, what they put out is float. ReLU leaves nothing to
do in float between two of them, as onnxruntime puts it into the rounding; GELU does. Attention's own products and masks,
softmax, norms and the sums of the residual stream stay in float, for their outliers would ruin the scale of all else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...measurement.output_rows import output_rows
from ...reports import progress
from .comparison import in_a_line, shapes_of
from .files import run, session, size_of
from .islands import float_islands, integer_products
from .products import as_gemms
from .quiet import quietly
from .report import ExportError, Int8Report
from .tracing import IN_ONE_FILE

# MiniLM on movie reviews, activations in 8, 7, 6 and 5 bits: with ReLU the logits change by 7, 12, 25 and 55 %, and 0,
# 0, 1.5 and 5.5 points of accuracy are lost; with GELU by 9, 16, 40 and 89 %, and 0, 0.3, 2.7 and 19.
_TOO_MUCH = 0.25

Sizes = Mapping[str, tuple[int | str, ...]]  # of a file's inputs: numbers, and words where they may change


def fed_by(batch: Mapping[str, Any], index: int, inputs: Sizes) -> dict[str, Tensor]:
    """Calibration batch `index`, cut to the file's inputs.

    Raises:
        ValueError: it lacks an input, or has a size that the file does not take.
    """
    for name, sizes in inputs.items():
        value = batch.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"calibration batch {index} has no {name!r}, which the file takes: it has {', '.join(batch)}. Give batches "
                "that are alike, and inputs=… with what they have"
            )
        fits = len(sizes) == value.dim() and all(
            isinstance(size, str) or size == got for size, got in zip(sizes, value.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"calibration batch {index}: {name} is {_product(value.shape)}, the file takes {_product(sizes)}. Give "
                "batches of that size, or let it change by dynamic=…"
            )
    return {name: batch[name] for name in inputs}


def quantise(source: Path, made: Path, batches: list[dict[str, Tensor]]) -> Int8Report:
    """Make a file of 8-bit integers, in the QDQ form: activations unsigned, asymmetric; weights signed, by output channel.

    Raises:
        ExportError: the network has no product with a weight, or onnxruntime cannot quantise the file, run it in float on
            the batches, or run what it made.
    """
    import onnx

    network = onnx.load(str(source))
    products = as_gemms(network)
    if not products:
        raise ExportError("the network has no linear map with a weight of its own: there is nothing to quantise")
    before, reader = session(source), _Reader(batches)
    try:
        with quietly():
            _quantise_static(network, made, reader, products, size_of(source) > IN_ONE_FILE)
    except Exception as error:  # onnx's and onnxruntime's classes derive from Exception alone
        for index, batch in enumerate(batches):
            _main(before, batch, index, "the float file")  # an ExportError, if that is what failed
        raise ExportError(f"onnxruntime does not quantise the network: {in_a_line(error)}") from error
    optimised = made.with_name("optimised.onnx")
    try:
        after = session(made, optimised)
    except Exception as error:
        raise ExportError(f"onnxruntime does not load the file of 8-bit integers: {in_a_line(error)}") from error
    difference = _difference(before, after, batches)
    graph = onnx.load(str(optimised), load_external_data=False).graph
    done = integer_products(graph), len(products)
    return Int8Report(len(batches), done, float_islands(graph), difference, size_of(source))


def _quantise_static(network: Any, made: Path, reader: _Reader, products: list[str], beside: bool) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        network,
        str(made),
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Gemm"],
        nodes_to_quantize=products,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=beside,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )


def _difference(before: Any, after: Any, batches: list[dict[str, Tensor]]) -> float:
    """‖after − before‖ / ‖before‖ of the main output of two sessions; ExportError where it is not finite."""
    moved = size = 0.0
    for index, batch in enumerate(batches):
        expected = _main(before, batch, index, "the float file")
        got = _main(after, batch, index, "the file of 8-bit integers")
        moved += float((got - expected).square().sum())
        size += float(expected.square().sum())
    if not math.isfinite(moved):
        raise ExportError("what the file of 8-bit integers puts out is not finite: look for batches with unusual values")
    return math.sqrt(moved / size) if size else 0.0


def _main(ready: Any, batch: dict[str, Tensor], index: int, what: str) -> Tensor:
    """The main output, (rows, features) without padding; ExportError where onnxruntime fails."""
    try:
        outputs = run(ready, batch)
    except Exception as error:
        raise ExportError(
            f"onnxruntime fails on {what} with calibration batch {index} of {shapes_of(batch)}: {in_a_line(error)}"
        ) from error
    main = next(value for value in outputs if value.is_floating_point())
    return output_rows(main, batch).double() if main.dim() > 1 else main.double()


class _Reader:
    """Batches as onnxruntime's calibration asks for them: one at a time, then None."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self._rest: Iterator[dict[str, Tensor]] = iter(progress(batches, "calibration"))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._rest, None)
        return None if batch is None else {name: value.detach().cpu().numpy() for name, value in batch.items()}


def _product(sizes: Iterable[int | str]) -> str:
    return " × ".join(map(str, sizes))


def warnings_of(report: Int8Report) -> tuple[str, ...]:
    """What is to be known of the file: that it computes something else, or that products stayed in float."""
    found = []
    if report.difference > _TOO_MUCH:
        found.append(
            f"8-bit integers change the main output by {report.difference:.0%}, which will cost accuracy: some activations "
            "have outliers that all else is small beside. Measure the file on your task, or export in float"
        )
    run, of = report.products
    if run < of:
        found.append(f"this onnxruntime computes {of - run} of {of} linear maps in float")
    return tuple(found)
