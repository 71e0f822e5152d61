"""What the Triton kernels reach on a GPU: times against F.gelu, bytes a second against a plain copy, and their block sizes.

    python -m scripts.benchmarks.cuda_kernels             # with the sizes that the package uses
    python -m scripts.benchmarks.cuda_kernels --sweep     # other block sizes too: the table that chose them

Times are medians of nine repeats, in which all take turns; tensors rotate so that no cache holds the next ones.
Bytes are those that must move: x in and f out forward, x and ∂L/∂f in and ∂L/∂x out backward. The copy moves as many.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_lambda_gelu.activation.kernels import cuda

SHAPES = ((4096, 4096), (16384, 4096))
HEAD = ("dtype", "elements", "pass", "what", "ms", "least", "most", "of_gelu", "share_of_copy", "gb_s")
REPEATS, TURNS = 9, 20
Run = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.cuda_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweep", action="store_true", help="other block sizes too")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures the kernels for one")
    card = torch.cuda.get_device_name().replace(" ", "-")
    path = options.results / f"cuda-kernels{'-sweep' if options.sweep else ''}-{card}.csv"
    options.results.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        for dtype, shape in itertools.product((torch.float32, torch.bfloat16), SHAPES):
            for row in rows(dtype, shape, options.sweep):
                writer.writerow(f"{value:.4g}" if isinstance(value, float) else value for value in row)
                print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row), flush=True)
    print(f"written: {path}")


def rows(dtype: torch.dtype, shape: tuple[int, int], sweep: bool) -> Iterator[tuple[object, ...]]:
    """A row for each pass and each that takes it."""
    copies = max(2, int(4e8 / (shape[0] * shape[1] * dtype.itemsize)))  # beyond any cache
    xs, grads = ([torch.randn(shape, device="cuda").to(dtype) for _ in range(copies)] for _ in range(2))
    one, each = torch.tensor([2.0], device="cuda"), torch.full(shape[1:], 2.0, device="cuda")
    gelu = torch.ops.aten.gelu, torch.ops.aten.gelu_backward
    forward: dict[str, Run] = {
        "copy": lambda i: torch.empty_like(xs[i]).copy_(xs[i]),
        "F.gelu": lambda i: gelu[0](xs[i]),
        "λ-GELU": lambda i: cuda.forward(xs[i], one, "gelu"),
        "λ-GELU, λ per neuron": lambda i: cuda.forward(xs[i], each, "gelu"),
    }
    half = shape[0] // 2
    backward: dict[str, Run] = {  # of one and a half times as many bytes
        "copy": lambda i: (torch.empty_like(xs[i]).copy_(xs[i]), torch.empty_like(xs[i][:half]).copy_(grads[i][:half])),
        "F.gelu": lambda i: gelu[1](grads[i], xs[i]),
        "λ-GELU": lambda i: cuda.backward(grads[i], xs[i], one, "gelu"),
        "λ-GELU, λ per neuron": lambda i: cuda.backward(grads[i], xs[i], each, "gelu"),
    }
    for name, runs, moved in (("forward", forward, 2), ("backward", backward, 3)):
        if sweep:
            runs |= {f"{what}, {label}": other for what, label, other in variants(runs, name)}
        times = interleaved(runs, copies)
        gelus, copied = times["F.gelu"], statistics.median(times["copy"])
        count = shape[0] * shape[1]
        for what, taken in times.items():
            ratio = statistics.median(mine / stock for mine, stock in zip(taken, gelus, strict=True))
            seconds = statistics.median(taken)
            rate = moved * count * dtype.itemsize / seconds / 1e9
            ms = (1e3 * seconds, 1e3 * min(taken), 1e3 * max(taken))
            yield str(dtype)[6:], count, name, what, *ms, ratio, copied / seconds, rate


def variants(runs: dict[str, Run], name: str) -> Iterator[tuple[str, str, Run]]:
    """The kernels with other block sizes; a forward pass has no sum to share."""
    for block, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 16)):
        for programs in (528, 1024, 2112, 8448) if name == "backward" else (1024,):
            label = f"_BLOCK={block} _WARPS={warps} _PROGRAMS={programs}"
            yield "λ-GELU", label, _with(runs["λ-GELU"], _BLOCK=block, _WARPS=warps, _PROGRAMS=programs)
    for block, warps, width in itertools.product((2048, 4096), (4, 8), (128, 256, 512, 1024)):
        for programs in (1024, 2112, 8448):
            label = f"_BLOCK={block} _WARPS={warps} _WIDTH={width} _PROGRAMS={programs}"
            changes = {"_BLOCK": block, "_WARPS": warps, "_WIDTH": width, "_PROGRAMS": programs}
            yield "λ-GELU, λ per neuron", label, _with(runs["λ-GELU, λ per neuron"], **changes)


def _with(run: Run, **constants: int) -> Run:
    def changed(i: int) -> object:
        with module_constants(**constants):
            return run(i)

    return changed


@contextmanager
def module_constants(**constants: int) -> Iterator[None]:
    before = {name: getattr(cuda, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(cuda, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(cuda, name, value)


def interleaved(runs: dict[str, Run], copies: int) -> dict[str, list[float]]:
    """{what: seconds of a call, a median for each repeat}; by events, with calls enough under way to hide the launches."""
    times: dict[str, list[float]] = {what: [] for what in runs}
    for run in runs.values():
        run(0)
    for repeat in range(REPEATS):
        for what in list(runs)[:: -1 if repeat % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # a millisecond, in which launches queue up
            start.record()
            for turn in range(TURNS):
                runs[what](turn % copies)
            end.record()
            end.synchronize()
            times[what].append(start.elapsed_time(end) / 1e3 / TURNS)
    return times


if __name__ == "__main__":
    main()
