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

from .networks import classifiers
from .rows import Row

TASKS = {"movies": "MiniLM, 2,000 movie reviews", "fashion": "DINOv2-small, 1,000 images of clothes"}
EXAMPLES, TOKENS = 8, 48  # in the batch that is timed
REPEATS, TURNS = 9, 8


def accuracy() -> Iterator[Row]:
    """Of the file in float and of that of integers, on the same test examples."""
    for name, what in TASKS.items():
        (*networks, batches), test = classifiers(name)
        with tempfile.TemporaryDirectory() as folder:
            before = [_export(model, Path(folder, f"{n}.onnx"), batches, False) for n, model in enumerate(networks)]
            after = [_export(model, Path(folder, f"{n}-8.onnx"), batches, True) for n, model in enumerate(networks)]
            pairs = list(zip(before, after, strict=True))
            cells = [f"{_correct(a.path, test):.1%} → {_correct(b.path, test):.1%}" for a, b in pairs]
        yield Row("INT8, onnxruntime", f"{what}: accuracy in float → in INT8", *cells)
        found = [
            ", ".join(f"{count} {name}" for name, count in b.int8.islands.items()) or "nothing" for b in after if b.int8
        ]
        yield Row("INT8, onnxruntime", f"{what.partition(',')[0]}: in float from product to product", *found)
        sizes = [f"{a.size / 1e6:.0f} → {b.size / 1e6:.0f}" for a, b in pairs]
        yield Row("INT8, onnxruntime", f"{what.partition(',')[0]}: MB of the file", *sizes)


def speed() -> Iterator[Row]:
    """One thread: each network against ReLU in INT8, and against itself in float, by turns."""
    (*networks, batches), _ = classifiers("movies")
    batch = {key: value[:EXAMPLES, :TOKENS] for key, value in batches[0].items()}
    sites = [
        next(name for name, part in model.named_modules() if name.endswith("intermediate_act_fn")) for model in networks
    ]
    blocks, rows = zip(*(hlg.feed_forward(m, site, batch) for m, site in zip(networks, sites, strict=True)), strict=True)
    yield from _times(f"a block of MiniLM, {len(rows[0])} tokens", blocks, [[each] for each in rows])
    yield from _times(f"MiniLM, {EXAMPLES} reviews", networks, [[batch]] * 3)


def _times(what: str, networks: Any, batches: list[list[Any]]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            [_runner(_export(model, Path(folder, f"{n}-{int8}.onnx"), given, int8).path, given[0]) for int8 in (False, True)]
            for n, (model, given) in enumerate(zip(networks, batches, strict=True))
        ]
    relu = runs[-1][1]
    cells = [_ratio(int8, relu) for _, int8 in runs[:-1]]
    yield Row("INT8, onnxruntime", f"{what}: time ÷ ReLU's", *cells, "1")
    yield Row("INT8, onnxruntime", f"{what}: time in float ÷ in INT8", *(_ratio(*both) for both in runs))


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


def _export(model: nn.Module, path: Path, batches: Any, int8: bool) -> hlg.ExportReport:
    return hlg.export_onnx(model, path, batches[0], int8=batches if int8 else None)


def _opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _runner(path: Path, batch: Any) -> Callable[[], object]:
    ready = _opened(path)
    names = [item.name for item in ready.get_inputs()]
    given = batch if isinstance(batch, dict) else {names[0]: batch}
    feed = {name: given[name].numpy() for name in names}
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
