"""What `import hf_lambda_gelu` costs beyond torch and transformers' activations, in fresh interpreters.

python -m scripts.benchmarks.import_time
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

BASELINE = "torch, transformers.activations"
PACKAGE = "torch, transformers.activations, hf_lambda_gelu"
BUDGET = 0.3  # seconds


def seconds(modules: str) -> float:
    """The time that a fresh interpreter takes for `import modules`, its own start left out."""
    code = f"import time; start = time.perf_counter()\nimport {modules}\nprint(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="fresh interpreters for each of the two (default: 5)")
    repeats = parser.parse_args().repeats
    seconds(PACKAGE)  # byte code and the disk's cache, which neither of the two is to pay for
    pairs = [(seconds(BASELINE), seconds(PACKAGE)) for _ in range(repeats)]  # in turn, as the machine's load drifts
    baseline, package = (statistics.median(column) for column in zip(*pairs, strict=True))
    difference = package - baseline
    print(f"import {BASELINE:<47} {baseline:6.2f} s")
    print(f"import {PACKAGE:<47} {package:6.2f} s")
    verdict = "within" if difference <= BUDGET else "over"
    print(f"difference of the medians of {repeats}: {difference:.2f} s, {verdict} the budget of {BUDGET} s")
    return int(difference > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
