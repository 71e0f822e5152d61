"""Exact verification, certified distance and hardware synthesis, on a network that reads digits."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import hf_lambda_gelu as hlg

from ..verification.queries import digits
from .networks import TRAIN, digit_accuracy, digit_networks
from .rows import Row, answer

EPSILON, IMAGES, LIMIT = 0.04, 25, 30.0
PRECISION = "ap_fixed<18,8>"


def solvers(epsilon: float = EPSILON, images: int = IMAGES) -> Iterator[Row]:
    """Local robustness of test images, by Marabou and by HiGHS; RuntimeError where their verdicts differ."""
    x, labels = (part[TRAIN : TRAIN + images] for part in digits())
    said: dict[str, list[str]] = {}

    def ask(solver: str, model: nn.Module) -> str:
        report = hlg.verify_robustness(model, x, labels, epsilon, clip=(0.0, 1.0), solver=solver, time_limit=LIMIT)
        said[solver] = [verdict.verdict for verdict in report.verdicts]
        _check_counterexamples(model, report, x, labels, epsilon)
        return ", ".join(f"{count} {name}" for name, count in report.counts.items() if count)

    for solver, name in (("marabou", "Marabou"), ("highs", "HiGHS")):
        cells = [
            answer(lambda model=model, solver=solver: ask(solver, model), (ValueError,), "smooth")  # type: ignore[misc]
            for model in digit_networks()[:3]
        ]
        yield Row(name, f"{images} digits, ε = {epsilon}: does the class hold?", *cells)
    if said["marabou"] != said["highs"]:
        raise RuntimeError(f"the solvers do not agree: {said}")


def _check_counterexamples(
    model: nn.Module, report: hlg.RobustnessReport, x: Tensor, labels: Tensor, epsilon: float
) -> None:
    """RuntimeError where torch in float64 does not confirm one."""
    for verdict in report.verdicts:
        if verdict.counterexample is None:
            continue
        point = torch.as_tensor(verdict.counterexample, dtype=torch.float64).reshape(1, -1)
        outputs = copy.deepcopy(model).double()(point)
        inside = float((point - x[verdict.index].double()).abs().max()) <= epsilon + 1e-12
        if not inside or int(outputs.argmax()) == int(labels[verdict.index]):
            raise RuntimeError(f"torch does not confirm the counterexample to digit {verdict.index}")


def distance(epsilon: float = 0.01, images: int = IMAGES) -> Iterator[Row]:
    """How far ReLU swapped in is from the smooth network in a box: what is proven, and what samples met."""
    x = digits()[0][TRAIN : TRAIN + images]

    def ask(model: nn.Module) -> str:
        report = hlg.certified_distance(model, x, epsilon, clip=(0.0, 1.0))
        return f"≤ {max(report.bounds):.2f}, met {max(report.measured):.2f} of {max(report.outputs):.0f}"

    cells = [ask(model) for model in digit_networks()[:3]]
    yield Row("certified distance", f"{images} digits, ε = {epsilon}: logits, from it to its ReLU", *cells)


def hardware() -> Iterator[Row]:
    """hls4ml's C++ in fixed point, compiled and run: the share of digits on which it names the same class as torch."""
    import hls4ml

    images = digits()[0][TRAIN:]

    def ask(model: nn.Module) -> str:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            names = {"default_precision": PRECISION, "granularity": "name"}
            config = hls4ml.utils.config_from_pytorch_model(model, (images.shape[1],), **names)
            made = hls4ml.converters.convert_from_pytorch_model(
                model, hls_config=config, output_dir=str(Path(folder, "project")), io_type="io_parallel"
            )
            made.compile()
            fixed = torch.from_numpy(made.predict(np.ascontiguousarray(images.numpy())))
        with torch.no_grad():
            same = float((fixed.argmax(-1) == model(images).argmax(-1)).float().mean())
        return f"{same:.3f} alike, accuracy {digit_accuracy(lambda _: fixed):.3f}"

    smooth, hardened, relu, _ = digit_networks()
    cells = [
        answer(lambda: ask(smooth), (Exception,), "Unsupported layer GELU"),
        answer(lambda: ask(hardened), (TypeError,), "got Proxy"),
        answer(lambda: ask(relu)),
    ]
    yield Row("hls4ml", f"digits in {PRECISION}", *cells)
