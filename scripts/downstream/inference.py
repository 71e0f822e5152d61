"""Export, zeros and what skipping them saves, on MiniLM and on a decoder."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import hf_lambda_gelu as hlg

from ..benchmarks import sparse_ffn
from .networks import sentence_networks
from .rows import Row, answer

ZEROS = 0.9  # of the decoder that is timed


def onnx() -> Iterator[Row]:
    """onnxruntime against torch, and the activations in the file."""
    *networks, batches = sentence_networks()
    with tempfile.TemporaryDirectory() as folder:
        reports = [
            hlg.export_onnx(model, Path(folder, f"{number}.onnx"), batches[0]) for number, model in enumerate(networks)
        ]
    differences = [f"{report.difference:.0e} apart" for report in reports]
    yield Row("ONNX, onnxruntime", "MiniLM, any batch and length: from torch, relative", *differences)
    found = [", ".join(f"{n} {name}" for name, n in r.operators.items() if name in ("Gelu", "Erf", "Relu")) for r in reports]
    yield Row("ONNX", "activations in the file", *found)


def zeros() -> Iterator[Row]:
    """Exact zeros after the activations."""
    *networks, batches = sentence_networks()

    def ask(model: nn.Module) -> str:
        return f"{hlg.activation_sparsity(model, batches).zeros:.0%}"

    cells = [answer(lambda model=model: ask(model), (ValueError,), "smooth") for model in networks]  # type: ignore[misc]
    yield Row("activation_sparsity", "MiniLM, 96 reviews: zeros after the activations", *cells)

    def dead(model: nn.Module) -> str:
        report = hlg.prune_dead_units(copy.deepcopy(model), batches)
        before, now = report.parameters
        return f"{1 - now / before:.1%} of the parameters gone"

    cells = [answer(lambda model=model: dead(model), (ValueError,), "smooth") for model in networks]  # type: ignore[misc]
    yield Row("prune_dead_units", "MiniLM: units that never fire on 96 reviews", *cells)


def sparse() -> Iterator[Row]:
    """A token of a decoder with random weights and this share of zeros: dense time ÷ sparse time, interleaved."""
    *networks, batches = sentence_networks()
    refused = [
        answer(lambda model=model: str(hlg.sparsify_ffn(copy.deepcopy(model), batches[0])), (ValueError,), "smooth")  # type: ignore[misc]
        for model in networks[:2]
    ]
    for what in sparse_ffn.MODELS:
        row = sparse_ffn.measure(what, torch.float32, ZEROS)
        cell = f"{row.ratio:.2f} [{row.least:.2f}–{row.most:.2f}]"
        yield Row("sparsify_ffn", f"{row.what}, {row.zeros:.0%} zeros: dense ÷ sparse time", *refused, cell)
