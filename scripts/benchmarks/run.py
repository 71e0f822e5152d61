"""What λ-GELU costs, as ratios to stock GELU that are measured interleaved in one run.

    python -m scripts.benchmarks.run                               # everything, on every device present: about ten minutes
    python -m scripts.benchmarks.run --only activation --threads 1

A ratio is the median of nine repeats, in brackets the least and the most. Memory is what autograd keeps for the backward
pass. Writes CSV and JSON into results/, named by device and versions, and a plot into runs/.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

import hf_lambda_gelu as hlg
from scripts.benchmarks import cases
from scripts.benchmarks.cases import STOCK, Result

SECTIONS: dict[str, Callable[[str], Iterator[Result]]] = {
    "activation": cases.activations,
    "compile": cases.compiled,
    "step": cases.training_steps,
}


@dataclass
class Options:
    only: list[str] = field(default_factory=lambda: [*SECTIONS, "conversion"], metadata={"help": "activation, compile …"})
    devices: list[str] = field(default_factory=lambda: ["cpu", "cuda"], metadata={"help": "of those that are there"})
    threads: int = field(default=2, metadata={"help": "of the CPU"})
    results: Path = Path(__file__).parent / "results"
    plots: Path = Path("runs")


def main() -> None:
    (options,) = HfArgumentParser(Options, prog="python -m scripts.benchmarks.run").parse_args_into_dataclasses()
    unknown = set(options.only) - {*SECTIONS, "conversion"}
    if unknown:
        raise SystemExit(f"unknown section {', '.join(sorted(unknown))}: expected {', '.join(SECTIONS)} or conversion")
    torch.set_num_threads(options.threads)
    hlg.set_kernels("fused")  # a benchmark of the fallback would be a surprise
    for device in (d for d in options.devices if d == "cpu" or torch.cuda.is_available()):
        found: list[Result] = []
        for name in options.only:
            if name in SECTIONS:
                print(f"\n{name}, {device}\n\n{_HEAD}")
                for result in SECTIONS[name](device):
                    print(row(result), flush=True)
                    found.append(result)
        times = list(cases.conversion(device)) if "conversion" in options.only else []
        if times:
            print("\n| model | verb | seconds | of building the model |\n|---|---|---|---|")
            for model, verb, seconds, ratio in times:
                print(f"| {model} | {verb} | {seconds:.3f} | {ratio:.3f} |")
        write(device, found, times, options)


_HEAD = "| dtype | shape | what | time | memory kept | stock GELU, ms |\n|---|---|---|---|---|---|"


def row(result: Result) -> str:
    return (
        f"| {result.dtype} | {result.shape} | {result.what} | {result.time:.2f} ({result.least:.2f}–{result.most:.2f}) "
        f"| {result.memory:.2f} | {result.stock_ms:.3g} |"
    )


def write(device: str, found: list[Result], times: list[tuple[str, str, float, float]], options: Options) -> None:
    """The CSV has the ratios, the JSON everything and the machine."""
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "hf_lambda_gelu": hlg.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    name = f"benchmark-{device}-torch{torch.__version__.split('+')[0]}-transformers{transformers.__version__}"
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([each.name for each in fields(Result)])
        for result in found:
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in asdict(result).values())
    document = {
        "machine": machine,
        "ratios": [asdict(result) for result in found],
        "conversion": [dict(zip(("model", "verb", "seconds", "of_building"), each, strict=True)) for each in times],
    }
    (options.results / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten: {options.results / name}.csv and .json")
    if found:
        options.plots.mkdir(parents=True, exist_ok=True)
        print(f"written: {plot(found, options.plots / f'{name}.png', machine)}")


def processor() -> str:
    """The CPU's name as the system gives it; platform.processor() is empty on most Linux machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def plot(found: list[Result], path: Path, machine: dict[str, object]) -> Path:
    """A panel for each section and dtype: ratio of time on a logarithmic axis, one row of dots for each rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((result.section, result.dtype) for result in found))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 2.2 * len(panels)), squeeze=False, layout="constrained")
    for (section, dtype), axis in zip(panels, axes[:, 0], strict=True):
        own = [result for result in found if (result.section, result.dtype) == (section, dtype)]
        rivals = list(dict.fromkeys(result.what for result in own))[::-1]
        shapes = list(dict.fromkeys(result.shape for result in own))
        for k, shape in enumerate(shapes):
            here = [result for result in own if result.shape == shape]
            offset = 0.6 * ((k + 0.5) / len(shapes) - 0.5)
            axis.errorbar(
                [r.time for r in here],
                [rivals.index(r.what) - offset for r in here],
                xerr=[[r.time - r.least for r in here], [r.most - r.time for r in here]],
                fmt="o",
                markersize=4,
                capsize=2,
                label=shape,
            )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", yticks=range(len(rivals)), yticklabels=rivals, title=f"{section}, {dtype}")
        axis.set_ylim(-0.6, len(rivals) - 0.4)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.tick_params(axis="x", which="minor", labelsize=7)
        axis.grid(axis="x", which="both", alpha=0.3)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"time, forward and backward, as a multiple of {STOCK}'s: {machine['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
