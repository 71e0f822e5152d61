"""The whole way on a real model: four fine-tunings alike but for the activation, and a table.

    python -m scripts.demo text     # MiniLM-L6 (BERT) on movie reviews
    python -m scripts.demo vision   # DINOv2-small (ViT) on Fashion-MNIST

Models and data come from package registries (scripts/tools/assets); no model hub is needed. Results stay in runs/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from scripts.tools.assets import asset
from scripts.tools.processes import run_module

# task → (script, model, data, what the table is called, arguments, sizes)
TASKS = {
    "text": {
        "script": "finetune_text",
        "model": "minilm",
        "data": "movie_reviews",
        "title": "MiniLM-L6 (BERT, 22.7M) on movie review snippets",
        "arguments": {"max_seq_length": 48, "learning_rate": 1e-4, "train_sampling_strategy": "group_by_length"},
        "sizes": {"small": (2000, 1000, 2), "full": (6041, 2000, 3)},
    },
    "vision": {
        "script": "finetune_image",
        "model": "dinov2_small",
        "data": "fashion_mnist",
        "title": "DINOv2-small (ViT, 22.1M) on Fashion-MNIST at 70 pixels",
        "arguments": {"image_size": 70, "learning_rate": 5e-5},
        "sizes": {"small": (1200, 1000, 2), "full": (6000, 5000, 3)},
    },
}


# what a run is called → (activation, compensate)
RUNS = {
    "gelu": ("stock", "least_squares"),
    "swapped": ("relu", "none"),
    "compensated": ("relu", "least_squares"),
    "lambda_gelu": ("lambda_gelu", "least_squares"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="default: runs/demo-TASK")
    options = parser.parse_args()
    task = TASKS[options.task]
    output = options.output_dir or Path("runs") / f"demo-{options.task}"
    train, evaluate, epochs = task["sizes"][options.size]
    start = time.time()
    model, data = asset(task["model"]), asset(task["data"])

    results = {}
    for name, (activation, compensate) in RUNS.items():
        print(f"\n=== {task['title']}: {name} ===", flush=True)
        arguments = {
            "model_name_or_path": model,
            "activation": activation,
            "compensate": compensate,
            "dataset_name": data,
            "validation_split": "test",
            "max_train_samples": train,
            "max_eval_samples": evaluate,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "warmup_steps": 0.1,
            "logging_steps": 25,
            "save_strategy": "no",
            "seed": options.seed,
            "output_dir": output / name,
            **task["arguments"],
        }
        run(task["script"], *(part for option, value in arguments.items() for part in (f"--{option}", str(value))))
        results[name] = json.loads((output / name / "results.json").read_text())

    split = ("--split", "test", "--max_samples", str(evaluate))
    folder = output / "compensated" / "relu"
    stock = json.loads(run("predict_stock", str(folder), "--dataset_name", str(data), *split, capture=True))
    text = table(task["title"], results, stock["accuracy"], train, evaluate, epochs, options.seed)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{time.time() - start:.0f} s; table, plot and checkpoint in {output}")
    after = results["compensated"]["metrics"]["after training"]["accuracy"]
    if abs(stock["accuracy"] - after) > 2.5 / evaluate:  # batches are padded differently: a tie may fall the other way
        sys.exit(f"stock transformers got {stock['accuracy']:.4f} from {folder}, the run had {after:.4f}")


def run(script: str, *arguments: str, capture: bool = False) -> str:
    """Run a script of this folder in a process of its own; its standard output if `capture`."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = run_module(f"scripts.{script}", *arguments, env=env, stdout=subprocess.PIPE if capture else None)
    if process.returncode:
        sys.exit(f"scripts.{script} failed with exit code {process.returncode}: see its output above")
    return (process.stdout or "").strip()


def table(title: str, results: dict, stock: float, train: int, evaluate: int, epochs: int, seed: int) -> str:
    """The accuracies and the learned profile, in Markdown."""
    gelu, swapped, compensated, learned = (results[name]["metrics"] for name in RUNS)
    rows = [
        ("GELU, fine-tuned", gelu["after training"]["accuracy"]),
        ("… with ReLU swapped in, unprepared", gelu["ReLU swapped in, unprepared"]["accuracy"]),
        ("… with ReLU substituted, compensated, no training", gelu["ReLU, not trained further"]["accuracy"]),
        ("ReLU swapped in first, fine-tuned as long", swapped["after training"]["accuracy"]),
        ("λ-GELU, hardened, before substitution", learned["after training"]["accuracy"]),
        ("λ-GELU, after substitution: a ReLU network", learned["after substitution"]["accuracy"]),
        ("ReLU substituted first, compensated, fine-tuned as long", compensated["after training"]["accuracy"]),
        ("… reloaded and run by stock transformers", stock),
    ]
    profile = results["lambda_gelu"]["learned_hardness"].values()
    lines = [f"{title}: {train:,} training examples, {epochs} epochs, {evaluate:,} test examples, seed {seed}", ""]
    lines += ["| model | test accuracy |", "|---|---|"] + [f"| {name} | {100 * value:.1f} % |" for name, value in rows]
    lines += ["", f"Learned λ by layer, before the ramp: {' '.join(f'{value:.2f}' for value in profile)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
