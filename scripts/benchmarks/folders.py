"""What converting a folder takes: with hard links the time of a stat, not of a read.

    python -m scripts.benchmarks.folders            # three minutes, 6 GB of disk; writes results/folders.csv

A Llama with random weights, 1.3 GB in shards, is converted by links and by copies, beside what reading its files once and
copying them takes; with the files in the page cache, and after `posix_fadvise` has had them dropped from it. A folder of as
many tensors in as many shards, with a thousandth of the bytes, stands beside it: a conversion that reads no weights takes as
long for either. All in one process, in turn, five times. "mb_read" is what came from the disk (/proc/self/io of Linux): of
each shard the header, and what the kernel reads ahead of it (8 MB where the table was made).
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hf_lambda_gelu as hlg

RESULTS = Path(__file__).parent / "results" / "folders.csv"
FIELDS = ["what", "cache", "seconds", "fastest", "slowest", "mb_read", "repeats", "folder_mb", "shards"]
LARGE: dict[str, int] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 32000}
SMALL: dict[str, int] = {**LARGE, "hidden_size": 32, "intermediate_size": 128, "vocab_size": 1000}
REPEATS, CHUNK = 5, 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.folders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, help="where to work; by default the folder for temporary files")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(dir=options.root) as root:
        rows = measure(Path(root))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{row[field]}" for field in FIELDS))


def measure(root: Path) -> list[dict[str, Any]]:
    """The rows: each way, with the files in the page cache and without."""
    source, small = model_folder(root / "model", LARGE, "200MB"), model_folder(root / "small", SMALL, "200KB")
    converted = root / "converted"  # what is made ReLU
    hlg.convert_checkpoint(source, converted)
    files = sorted(source.glob("*.safetensors"))
    assert len(list(small.glob("*.safetensors"))) == len(files)
    ways: dict[str, Callable[[Path], Any]] = {
        "convert_checkpoint, links": lambda target: hlg.convert_checkpoint(source, target),
        "convert_checkpoint, links, a thousandth of the bytes": lambda target: hlg.convert_checkpoint(small, target),
        "relu_ize_checkpoint, links": lambda target: hlg.relu_ize_checkpoint(converted, target, force=True),
        "convert_checkpoint, copies": lambda target: hlg.convert_checkpoint(source, target, link=False),
        "read once": lambda target: [read(path) for path in files],
        "copy": lambda target: copied(source, target),
    }
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for cache in ("warm", "dropped"):
            for what, way in ways.items():
                for path in files:
                    read(path) if cache == "warm" else drop(path)
                before, start = read_so_far(), time.perf_counter()
                way(root / "target")
                seconds = time.perf_counter() - start
                taken.setdefault((what, cache), []).append((seconds, read_so_far() - before))
                shutil.rmtree(root / "target", ignore_errors=True)
    size = sum(path.stat().st_size for path in files) / 1e6
    return [row(what, cache, found, size, len(files)) for (what, cache), found in taken.items()]


def row(what: str, cache: str, found: list[tuple[float, float]], size: float, shards: int) -> dict[str, Any]:
    seconds = [item[0] for item in found]
    numbers = {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    shown = {name: f"{value:.2f}" for name, value in numbers.items()}
    megabytes = f"{statistics.median(item[1] for item in found) / 1e6:.1f}"
    end = {"mb_read": megabytes, "repeats": len(found), "folder_mb": f"{size:.0f}", "shards": shards}
    return {"what": what, "cache": cache, **shown, **end}


def model_folder(folder: Path, size: dict[str, int], shard: str) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=16, num_key_value_heads=16))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(CHUNK):
            pass


def drop(path: Path) -> None:
    """Has the kernel forget a file's pages, which are on the disk by then."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def copied(source: Path, target: Path) -> None:
    """A copy that is on the disk in the end, as a converted folder is."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        opened = os.open(path, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)


def read_so_far() -> int:
    """Bytes that this process has had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
