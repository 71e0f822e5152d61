"""What a refit costs whose weights stay in the checkpoint's files, against one in memory: seconds by part, and peak memory.

    python -m scripts.benchmarks.streaming                                        # 8, 16 and 32 blocks on the CPU, both ways
    python -m scripts.benchmarks.streaming --hinges 2 --blocks 8 16 --size 512 288 --tokens 640 --batch 1 --length 128 --add
    python -m scripts.benchmarks.streaming --device cuda --parameters 1.3e9       # one model through one GPU, streamed alone

Llamas with random weights and random tokens. Each run is a process of its own, which reads a saved folder and leaves a ReLU
checkpoint; both ways take turns. Memory is the highest resident set above that after the imports (mapped files count while
they are looked at); on a GPU also what torch had allocated there at most. The parts of a run's seconds: reading weights,
forward passes (without reading), Gram products, solving, writing; the rest is what is left.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import on_disk_files
from hf_lambda_gelu.measurement import change
from hf_lambda_gelu.structure import file_source
from hf_lambda_gelu.surgery.refit import engine, refit_files, ridge, runs, two_networks
from scripts.tools.processes import run_module

RESULTS = Path(__file__).parent / "results"
WAYS = ("streamed", "in memory")
PARTS = ("read", "forward", "gram", "solve", "write")
COLUMNS = [
    "device",
    "dtype",
    "blocks",
    "parameters",
    "block_mb",
    "moments_mb",
    "batch_mb",
    "tokens",
    "hinges",
    "way",
    "repeat",
    "seconds",
]
COLUMNS += [*PARTS, "rest", "peak_mb", "device_peak_mb", "relative_change", "torch"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 1088], help="hidden size, and that of the FFN")
    parser.add_argument("--parameters", type=float, help="one model of about so many, in place of --blocks")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=2, help="windows in a batch")
    parser.add_argument("--hinges", type=int, default=1, help="ReLUs in the place of each gate")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--add", action="store_true", help="keep the rows that are there")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), options.one[1], options)))
        return
    ways = options.ways or (WAYS if options.device == "cpu" else WAYS[:1])
    path = options.csv or RESULTS / f"streaming-{options.device}-torch{torch.__version__.split('+')[0]}.csv"
    with tempfile.TemporaryDirectory() as root:
        rows = run_all(options, ways, Path(root))
    if options.add:
        rows = [*csv.DictReader(path.open(newline="")), *rows]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"written: {path}")


def run_all(options: argparse.Namespace, ways: list[str], root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for config in configs(options):
        start = time.perf_counter()
        folder = root / f"llama-{config.num_hidden_layers}"
        known = make(config, folder, options)
        print(f"{config.num_hidden_layers} blocks made in {time.perf_counter() - start:.0f} s", flush=True)
        for repeat in range(options.repeats):
            for way in ways if repeat % 2 == 0 else reversed(ways):
                child = run_module("scripts.benchmarks.streaming", *_arguments(options, folder, way), stdout=subprocess.PIPE)
                if child.returncode:
                    raise SystemExit(f"{way} failed with exit code {child.returncode}: see its output above")
                found = json.loads(child.stdout.splitlines()[-1])
                rows.append({**known, "way": way, "repeat": repeat, **found})
                print({name: rows[-1][name] for name in COLUMNS}, flush=True)
        shutil.rmtree(folder)
    return rows


def _arguments(options: argparse.Namespace, folder: Path, way: str) -> list[str]:
    names = ("device", "dtype", "tokens", "length", "batch", "threads", "hinges")
    return ["--one", str(folder), way, *(text for name in names for text in (f"--{name}", str(getattr(options, name))))]


def configs(options: argparse.Namespace) -> list[LlamaConfig]:
    """Blocks of --size, 30 MB in fp32 by default; of 51 or 113 million parameters for a model of so many."""
    if options.parameters is None:
        return [_config(*options.size, 1000, count) for count in options.blocks]
    hidden, inner = (2048, 5632) if options.parameters < 2e9 else (3072, 8192)
    vocabulary = 32000
    each = 4 * hidden * hidden + 3 * hidden * inner
    return [_config(hidden, inner, vocabulary, round((options.parameters - 2 * vocabulary * hidden) / each))]


def _config(hidden: int, inner: int, vocabulary: int, blocks: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
    )


def make(config: LlamaConfig, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Saves the model; what is known of it before it runs."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="1GB")
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    inner, hidden = options.hinges * config.intermediate_size, config.hidden_size
    return {
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "dtype": options.dtype,
        "blocks": config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "block_mb": round(block / 1e6, 1),
        # the sums of the rows to fit on and of those to judge by, and as much again while they are solved, fp64
        "moments_mb": round(4 * 8 * inner * (inner + hidden) / 1e6, 1),
        "batch_mb": round(options.batch * options.length * (3 * inner + 4 * hidden + 2 * config.vocab_size) * 4 / 1e6, 1),
        "tokens": options.tokens,
        "hinges": options.hinges,
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------------------------------- one run


def measure(folder: Path, way: str, options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(1)
    count = options.tokens // (options.batch * options.length)
    shape = (options.batch, options.length)
    batches = [{"input_ids": torch.randint(0, 1000, shape, generator=generator)} for _ in range(count)]
    clock = Clock(options.device != "cpu")
    clock.watch()
    before = resident()
    forget_peak()
    start = time.perf_counter()
    target = folder.with_name("relu")
    how: dict[str, Any] = {"compensate": "least_squares", "hinges": options.hinges}
    if way == "streamed":
        made = hlg.relu_ize_checkpoint(folder, target, calibration=batches, device=options.device, **how)
        report: Any = made.model
    else:
        model = LlamaForCausalLM.from_pretrained(folder).to(options.device)
        hlg.convert(model)
        report = hlg.relu_ize(model, calibration=batches, **how)
        hlg.save_relu_pretrained(model, target)
    seconds = time.perf_counter() - start
    peak = peak_resident() - before
    shutil.rmtree(target)
    parts = {name: round(clock.seconds[name], 2) for name in PARTS}
    return {
        "seconds": round(seconds, 1),
        **parts,
        "rest": round(seconds - sum(parts.values()), 1),
        "peak_mb": round(peak / 1e6),
        "device_peak_mb": 0 if options.device == "cpu" else round(torch.cuda.max_memory_allocated() / 1e6),
        "relative_change": f"{report.relative_change:.6e}",
    }


class Clock:
    """Seconds by part; what runs within another part counts for the inner one alone."""

    def __init__(self, synchronise: bool) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronise = synchronise
        self._inner = [0.0]

    def watch(self) -> None:
        """Lets the package's own functions be timed, in this process."""
        for owner, name, part in (
            (file_source.FileSource, "load_all", "read"),
            (runs.Run, "__call__", "forward"),
            (two_networks, "call", "forward"),
            (change, "run_batch", "forward"),
            (ridge.Moments, "add", "gram"),
            (engine, "decide", "solve"),
            (refit_files.RefitFiles, "_write", "write"),
            (on_disk_files.Source, "finish", "write"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        return timed

    def _wait(self) -> None:
        if self._synchronise:
            torch.cuda.synchronize()


def resident() -> int:
    return _status("VmRSS")


def peak_resident() -> int:
    return _status("VmHWM")


def forget_peak() -> None:
    """The highest resident set starts anew, from what it is now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
