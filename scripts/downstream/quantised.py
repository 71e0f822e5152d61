"""8-bit integers in onnxruntime: accuracy, size, what stays in float, and time, of fine-tuned classifiers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import hf_lambda_gelu as hlg

from .networks import MILD, classifiers
from .rows import Row

TOOL = "INT8, onnxruntime"
EXAMPLES = 8  # in the batch that is timed
REPEATS, TURNS = 9, 8


def int8() -> Iterator[Row]:
    """Both files of each network, in float and in integers: on the same test examples, and by turns in one thread."""
    (*networks, batches), test = classifiers()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [_exported(network, Path(folder, str(n)), batches) for n, network in enumerate(networks)]
        cells = [f"{_correct(a.path, test):.1%} → {_correct(b.path, test):.1%}" for a, b in pairs]
        yield Row(TOOL, f"MiniLM, 2,000 reviews: accuracy in float → in INT8 (λ = {MILD})", *cells)
        found = [b.int8.islands for _, b in pairs if b.int8 is not None]
        cells = [", ".join(f"{count} {operators}" for operators, count in one.items()) or "nothing" for one in found]
        yield Row(TOOL, "MiniLM: in float between one linear map and the next", *cells)
        batch = {key: value[:EXAMPLES] for key, value in test[-1][0].items()}
        yield _times(f"MiniLM, {EXAMPLES} reviews", pairs, [batch] * 3)
        yield _block(networks, batch, Path(folder))


def _block(networks: list[nn.Module], batch: dict[str, Tensor], folder: Path) -> Row:
    """The first feed-forward block alone."""
    sites = [next(name for name, _ in model.named_modules() if name.endswith("intermediate_act_fn")) for model in networks]
    found = [hlg.feed_forward(model, site, batch) for model, site in zip(networks, sites, strict=True)]
    pairs = [_exported(block, folder / f"block-{n}", [rows]) for n, (block, rows) in enumerate(found)]
    return _times(f"an FFN of it, {len(found[0][1])} tokens", pairs, [{"input": rows} for _, rows in found])


Pair = tuple[hlg.ExportReport, hlg.ExportReport]  # in float, in integers


def _exported(model: nn.Module, folder: Path, batches: Any) -> Pair:
    return (
        hlg.export_onnx(model, folder / "float.onnx", batches[0]),
        hlg.export_onnx(model, folder / "int8.onnx", batches[0], int8=batches),
    )


def _times(what: str, pairs: list[Pair], batches: list[dict[str, Tensor]]) -> Row:
    *smooth, relu = [_runner(pair[1].path, batch) for pair, batch in zip(pairs, batches, strict=True)]
    return Row(TOOL, f"{what}: time ÷ ReLU's", *(_ratio(run, relu) for run in smooth), "1")


def _ratio(first: Callable[[], object], second: Callable[[], object]) -> str:
    """Of their times, by turns: the median over the repeats, least and most. CPU time of the one thread that they run in."""
    ratios = []
    for _ in range(REPEATS):
        taken: tuple[list[float], list[float]] = ([], [])
        for turn in range(TURNS):
            for which in (0, 1) if turn % 2 else (1, 0):
                start = time.thread_time()
                (first, second)[which]()
                taken[which].append(time.thread_time() - start)
        ratios.append(statistics.median(taken[0]) / statistics.median(taken[1]))
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]"


def _opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _runner(path: Path, batch: dict[str, Tensor]) -> Callable[[], object]:
    ready = _opened(path)
    feed = {item.name: batch[item.name].numpy() for item in ready.get_inputs()}
    return lambda: ready.run(None, feed)


def _correct(path: Path, test: list[tuple[dict[str, Tensor], Tensor]]) -> float:
    """The share of the examples that the file classifies rightly."""
    ready = _opened(path)
    names = [item.name for item in ready.get_inputs()]
    right = [
        torch.from_numpy(ready.run(["logits"], {name: batch[name].numpy() for name in names})[0]).argmax(-1) == labels
        for batch, labels in test
    ]
    return float(torch.cat(right).float().mean())
