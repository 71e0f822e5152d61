"""What is told of an ONNX export: the report and the error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...reports import span, to_dict

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
class Int8Report:
    """What the quantisation of a file to 8-bit integers did; `ExportReport.int8`.

    Attributes:
        batches: that the ranges of the activations were taken from.
        products: linear maps that onnxruntime runs in 8-bit integers, and how many there are.
        islands: what it computes in float between one such product and the next → how often. Empty where ReLU is the
            activation, an activation each where it is not; operators joined by +.
        difference: ‖int8 − float‖ / ‖float‖ of the main output, over these batches, without padding.
        float_size: bytes of the file in float32.

    Examples:
        >>> report = hlg.export_onnx(model, "int8.onnx", int8=batches)  # import hf_lambda_gelu as hlg
        >>> report.int8.islands, report.size / report.int8.float_size
    """

    batches: int
    products: tuple[int, int]
    islands: dict[str, int]
    difference: float
    float_size: int

    def __str__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.islands.items()) or "nothing"
        return (
            f"8-bit integers in {self.products[0]} of {self.products[1]} linear maps, ranges from {self.batches} batches\n"
            f"  in float between one and the next: {found}\n"
            f"  main output changed by {self.difference:.1%} (‖int8 − float‖ / ‖float‖); the float file has "
            f"{self.float_size / 1e6:.1f} MB"
        )


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
        int8: of a file of 8-bit integers, how it came to them; `difference` is that of the file in float before.
        warnings: sizes that could not be kept dynamic, and runtimes that would not run what the config says.

    Examples:
        >>> report = hlg.export_onnx("sst2-relu", "sst2-relu.onnx")  # import hf_lambda_gelu as hlg
        >>> report.operators["Relu"], report.difference < 2e-5
        (12, True)
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
    int8: Int8Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return to_dict(self)

    def __str__(self) -> str:
        found = [f"{count} {name}" for name, count in self.operators.items() if name in _ACTIVATIONS]
        lines = [
            f"{self.path}: {self.size / 1e6:.1f} MB, opset {self.opset}, {sum(self.operators.values())} operators"
            + (f", of these {', '.join(found)}" if found else ""),
            *(f"  {name}: {sizes_in_words(shape)}" for name, shape in self.inputs.items()),
            *(f"  → {name}: {sizes_in_words(shape)}" for name, shape in self.outputs.items()),
        ]
        if self.folded:
            lines.append(f"  λ folded into the weights at {len(self.folded)} sites: {span(list(self.folded))}")
        main = next(iter(self.inputs), "")
        *others, last = [sizes_in_words(shapes[main]) for shapes in self.checked]
        fed = f"{', '.join(others)} and {last}" if others else last
        before = "" if self.int8 is None else "before, in float: "
        lines.append(
            f"  {before}onnxruntime computes what torch does within {self.difference:.1e} (relative), with {main} of {fed}"
        )
        lines += [] if self.int8 is None else [f"  {self.int8}"]
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


def sizes_in_words(shape: tuple[int | str, ...]) -> str:
    """2 × 3 × height × width."""
    return " × ".join(map(str, shape)) or "a number"
