"""A few steps after the refit: SmolLM2 with one and two ReLUs per gate learns from the smooth model's predictions.

    python -m scripts.studies.training_free.distilled --cache runs/refit          # what results/distilled.csv lacks
    python -m scripts.studies.training_free.distilled --cache runs/refit --variants k2 --seeds 0
    python -m scripts.studies.training_free.distilled --table

A row of results/distilled.csv is one run: the refit of hinges.py on 20,480 tokens, drawn by the seed, then 60 steps of 8
windows of 256 tokens of the same train splits, in an order drawn by the seed. Perplexity is on the 10,240 test tokens of
hinges.py. With one ReLU per gate all weights learn. With two the maps that the refit made, up and down, are frozen, as the
first steps of all weights lead away (first_steps.py). A refit model is made once and kept in the cache, as
`smollm2-<variant>-seed<seed>`; an interrupted run goes on from its last checkpoint there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.relu_ize_lm import Arguments, windows
from scripts.studies.training_free.hinges import VARIANTS
from scripts.studies.training_free.judged import SmolLM2
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parents[1] / "results" / "distilled.csv"
FIELDS = (
    "task", "variant", "seed", "steps", "batch", "tokens", "rate", "frozen", "optimizer", "metric", "smooth", "refit",
    "distilled", "seconds", "device", "versions",
)  # fmt: skip
STEPS, BATCH, MICRO = 60, 8, 2  # the logits of a whole batch take gigabytes
RATES = {"k1": 2e-4, "k2": 5e-5}
FROZEN: dict[str, tuple[str, ...]] = {"k1": (), "k2": ("up_proj", "down_proj")}  # modules that do not learn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.distilled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/distilled"), help="folder of the refit models, outside git")
    parser.add_argument("--variants", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="learning rate, in place of the variant's own")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu", help="where the models run, such as cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and measure nothing")
    options = parser.parse_args(argv)
    if options.table:
        print(table(options.results))
        return
    datasets.disable_progress_bars()
    wanted = [(variant, seed) for seed in options.seeds for variant in options.variants]
    missing = [key for key in wanted if not _is_there(*key, options)]
    if missing:
        measure(missing, options)


def _is_there(variant: str, seed: int, options: argparse.Namespace) -> bool:
    wanted = (variant, str(seed), str(options.steps), f"{options.rate or RATES[variant]:g}")
    return any((r["variant"], r["seed"], r["steps"], r["rate"]) == wanted for r in read(options.results))


def measure(missing: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Measure and append these rows; the smooth model is judged once."""
    task = SmolLM2()
    teacher = AutoModelForCausalLM.from_pretrained(task.folder).eval().to(options.device)
    smooth, _ = task.judge(teacher, options.device)
    for variant, seed in missing:
        student = refit(task, variant, seed, options).to(options.device)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not any(f".{module}." in name for module in FROZEN[variant]))
        before, _ = task.judge(student, options.device)
        print(f"{variant} seed {seed}: {smooth:.4f} → {before:.4f} by the refit", flush=True)
        rate = options.rate or RATES[variant]
        run = options.cache / f"steps-{variant}-seed{seed}-{options.steps}-{rate:g}"
        start = time.perf_counter()
        learn(student, teacher, task, seed, rate, run, options)
        seconds = time.perf_counter() - start
        after, _ = task.judge(student.eval(), options.device)
        row = {
            "task": "smollm2",
            "variant": variant,
            "seed": seed,
            "steps": options.steps,
            "batch": BATCH,
            "tokens": options.steps * BATCH * Arguments().length,
            "rate": f"{rate:g}",
            "frozen": " ".join(FROZEN[variant]),
            "optimizer": "AdamW",
            "metric": task.metric,
            "smooth": f"{smooth:.4f}",
            "refit": f"{before:.4f}",
            "distilled": f"{after:.4f}",
            "seconds": f"{seconds:.1f}",
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
            "versions": " ".join(package_versions().values()),
        }
        append(options.results, FIELDS, [row])
        shutil.rmtree(run)
        print(f"{variant} seed {seed}: → {after:.4f} by {options.steps} steps, {seconds:.0f} s", flush=True)


def refit(task: SmolLM2, variant: str, seed: int, options: argparse.Namespace) -> PreTrainedModel:
    """The ReLU network of hinges.py, from the cache if it is there."""
    folder = options.cache / f"smollm2-{variant}-seed{seed}"
    if not (folder / "config.json").is_file():
        model = task.load().eval().to(options.device)
        hlg.convert(model)
        batches = list(task.batches(seed))
        hlg.relu_ize(model, calibration=batches, compensate="least_squares", **VARIANTS[variant])
        hlg.save_relu_pretrained(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def learn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: SmolLM2,
    seed: int,
    rate: float,
    run: Path,
    options: argparse.Namespace,
) -> None:
    """The steps, on windows of the train splits that are drawn by the seed."""
    settings = Arguments()
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    pool = windows(settings, tokenizer, "train", 2 * STEPS * BATCH * settings.length)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    rows = [{"input_ids": pool[index]} for index in order[: options.steps * BATCH]]
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=options.steps,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        learning_rate=rate,
        warmup_steps=0.1,
        weight_decay=0.0,
        logging_steps=5,
        save_steps=20,
        save_total_limit=1,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
    )
    trainer = hlg.DistillationTrainer(student, arguments, teacher=teacher, train_dataset=rows)
    trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))


def table(results: Path = RESULTS) -> str:
    """Means over the seeds, as Markdown."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in read(results):
        groups.setdefault((row["variant"], row["steps"], row["rate"]), []).append(row)
    heads = ("variant", "steps", "rate", "seeds", "smooth", "refit", "÷ smooth", "distilled", "÷ smooth", "seconds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (variant, steps, rate), rows in groups.items():
        smooth, before, after, seconds = (
            statistics.fmean(float(row[name]) for row in rows) for name in ("smooth", "refit", "distilled", "seconds")
        )
        cells = [variant, steps, rate, str(len(rows)), f"{smooth:.2f}", f"{before:.2f}", f"{before / smooth:.3f}"]
        cells += [f"{after:.2f}", f"{after / smooth:.3f}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
