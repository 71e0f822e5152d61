"""Compensated substitution without training, on models of three kinds: judged smooth, and with ReLU.

    python -m scripts.studies.training_free.run              # what results/training_free.csv lacks
    python -m scripts.studies.training_free.run --tasks dinov2 --methods least_squares --sizes 200 --seeds 0 1
    python -m scripts.studies.training_free.run --table

A row of results/training_free.csv is one substitution; the seed draws the calibration examples and nothing else.
Each runs in a process of its own, so that peak memory is its own. An interrupted run goes on where it stopped. The tasks
are in tasks.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.tools.processes import run_module
from scripts.tools.tables import append, read

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parents[1] / "results" / "training_free.csv"
TRANSCRIPTS = "whisper_transcripts.json"  # beside the CSV
FIELDS = (
    "task", "model", "parameters", "method", "calibration", "seed", "metric", "smooth", "substituted", "extra",
    "seconds", "cpu_seconds", "before_mb", "peak_mb", "versions",
)  # fmt: skip
SIZES = {"albert": [50, 200], "whisper": [25, 50], "dinov2": [200, 600]}  # calibration examples
METHODS = ("none", "bias", "least_squares")

# torch is imported by the measuring processes alone: a process starts with the peak memory of the one that started it.


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", type=int, help="calibration examples; by default the task's own two")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
    elif options.table:
        print(table(options.results))
    else:
        with tempfile.TemporaryDirectory(prefix="training_free-") as folder:
            for key in wanted(options):
                run(options.results, key, folder)


def wanted(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Task, method, calibration size and seed of each row; a naive swap has no calibration set, so it is one row."""
    for task in options.tasks:
        for method in options.methods:
            if method == "none":
                yield {"task": task, "method": method, "calibration": 0, "seed": 0}
                continue
            for size in options.sizes or SIZES[task]:
                yield from ({"task": task, "method": method, "calibration": size, "seed": seed} for seed in options.seeds)


def run(results: Path, key: dict[str, Any], folder: str) -> None:
    """Measure and append, unless the row is there. What the smooth model gives is measured once, and kept in `folder`."""
    if any(all(row[name] == str(value) for name, value in key.items()) for row in read(results)):
        return
    if not (Path(folder) / key["task"]).exists():
        _child({**key, "method": None, "folder": folder})
    row = _child({**key, "folder": folder})
    transcripts = row.pop("transcripts", None)
    append(results, FIELDS, [{**key, **row}])
    if transcripts and key["seed"] == 0:
        path = results.parent / TRANSCRIPTS
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        kept[f"{key['method']} {key['calibration']}"] = transcripts
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({**key, **{name: row[name] for name in ("smooth", "substituted", "extra", "seconds")}}), flush=True)


def measure(task: str, method: str | None, calibration: int, seed: int, folder: str) -> dict[str, Any]:
    """One row of the results; with method None, judge the smooth model and keep what it gives in `folder`."""
    import datasets
    import torch

    import hf_lambda_gelu as hlg
    from hf_lambda_gelu.checkpoints.card import package_versions
    from scripts.studies.training_free.tasks import TASKS

    work, kept = TASKS[task], Path(folder) / task
    datasets.disable_progress_bars()
    model = work.load().eval()
    if method is None:
        torch.save(work.judge(model, None), kept)
        return {}
    smooth = torch.load(kept, weights_only=True)
    parameters = sum(p.numel() for p in model.parameters())
    hlg.convert(model)
    options: dict[str, Any] = {"force": True}
    if method != "none":
        options = {"calibration": work.batches(smooth, calibration, seed), "compensate": method}
    before, wall, processor = peak_mb(), time.perf_counter(), time.process_time()
    hlg.relu_ize(model, **options)
    seconds, cpu_seconds, peak = time.perf_counter() - wall, time.process_time() - processor, peak_mb()
    found = work.judge(model, smooth)
    extra = [f"{name}={found[name]:.4f}" for name in work.shown]
    extra += [f"smooth_{name}={smooth[name]:.4f}" for name in work.shown if name in smooth]
    row = {
        "model": work.asset,
        "parameters": parameters,
        "metric": work.metric,
        "smooth": f"{smooth['score']:.4f}",
        "substituted": f"{found['score']:.4f}",
        "extra": " ".join(extra),
        "seconds": f"{seconds:.1f}",
        "cpu_seconds": f"{cpu_seconds:.1f}",
        "before_mb": before,
        "peak_mb": peak,
        "versions": " ".join(package_versions().values()),
    }
    return row | ({"transcripts": found["transcripts"]} if "transcripts" in found else {})


def peak_mb() -> int:
    """Peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _child(arguments: dict[str, Any]) -> dict[str, Any]:
    done = run_module("scripts.studies.training_free.run", "--child", json.dumps(arguments), capture_output=True)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: Path = RESULTS) -> str:
    """The rows as Markdown: means over seeds, and the difference to the smooth model with its 95 % t-interval.

    The interval is over draws of the calibration examples: the examples to judge by are the same throughout.
    """
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read(results):
        groups.setdefault(tuple(row[name] for name in ("task", "metric", "method", "calibration")), []).append(row)
    heads = ("task", "metric", "method", "calibration", "seeds", "smooth", "substituted", "difference", "also")
    heads += ("seconds", "CPU seconds", "MB before", "MB peak")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for group, rows in groups.items():

        def mean(name: str, rows: list[dict[str, str]] = rows) -> float:
            return statistics.fmean(float(row[name]) for row in rows)

        cells = [*group, str(len(rows)), f"{mean('smooth'):.3f}", f"{mean('substituted'):.3f}"]
        cells += [difference(rows), also(rows)]
        cells += [f"{mean(name):.0f}" for name in ("seconds", "cpu_seconds", "before_mb", "peak_mb")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(rows: list[dict[str, str]]) -> str:
    """Mean of substituted − smooth, ± half of the interval where there are several seeds."""
    values = [float(row["substituted"]) - float(row["smooth"]) for row in rows]
    mean = f"{statistics.fmean(values):+.3f}"
    if len(values) == 1:
        return mean
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.3f}"


def also(rows: list[dict[str, str]]) -> str:
    """Means of what else was measured: "name=value" pairs."""
    pairs = [dict(pair.split("=") for pair in row["extra"].split()) for row in rows]
    return ", ".join(
        f"{name.replace('_', ' ')} {statistics.fmean(float(pair[name]) for pair in pairs):.3f}" for name in pairs[0]
    )


if __name__ == "__main__":
    main()
