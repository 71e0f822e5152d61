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
        lines.append(f"  onnxruntime computes what torch does within {self.difference:.1e} (relative), with {main} of {fed}")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


def sizes_in_words(shape: tuple[int | str, ...]) -> str:
    """2 × 3 × height × width."""
    return " × ".join(map(str, shape)) or "a number"
