"""Sentences of the pages that say what was measured: each made from committed results, as the page must have it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from statistics import mean

from scripts.architectures import hinges as wider
from scripts.architectures import proofs
from scripts.architectures import run as coverage
from scripts.benchmarks import refit_parts
from scripts.benchmarks import report as benchmarks
from scripts.downstream.__main__ import RESULTS as DOWNSTREAM
from scripts.matrix import run as matrix
from scripts.studies import report, robustness, run
from scripts.studies.training_free import distilled, first_steps, hinges
from scripts.tools.tables import read
from scripts.verification import agreement

from .wording import next_power, power, raised

Sentences = dict[str, tuple[str, Callable[[], list[str]]]]


# ---------------------------------------------------------------------------------------------------------- what it costs


def refit_cost() -> list[str]:
    """Of SmolLM2 with all of its layers: the refit and its parts, its floor, and SparseGPT."""
    rows = {row["what"]: row for row in read(refit_parts.RESULTS) if row["layers"] == "30"}
    whole = {name: float(rows["refit"][name]) for name in ("seconds", "memory", *refit_parts.PARTS)}
    floor, rival = rows["floor"], rows["sparsegpt"]
    return [
        f"takes {whole['seconds']:.0f} CPU seconds, {whole['passes']:.0f} of them in passes, {whole['gram']:.0f} in "
        f"products, {whole['solves']:.0f} in solves and {whole['disk']:.0f} at the disk, "
        f"and {whole['memory'] / 1000:.2f} GB at most",
        f"take {float(floor['seconds']):.0f}; llm-compressor's SparseGPT on all linear maps takes "
        f"{float(rival['seconds']):.0f}, and {float(rival['memory']) / 1000:.2f} GB",
    ]


def refit_cost_again() -> list[str]:
    row = next(row for row in read(refit_parts.RESULTS) if (row["layers"], row["what"]) == ("30", "refit"))
    tokens, seconds, memory = int(row["tokens"]), float(row["seconds"]), float(row["memory"])
    return [f"on {tokens:,} tokens took {seconds:.0f} CPU seconds and {memory / 1000:.2f} GB"]


def steps_on_cpu() -> list[str]:
    rows = read(benchmarks.CPU)
    bert, vit = (benchmarks.ratio(row) for row in rows if row["section"] == "training step")
    block = {
        row["dtype"]: float(row["time"])
        for row in rows
        if row["section"] == "torch.compile" and row["shape"].startswith("feed-forward")
    }
    times = json.loads(benchmarks.CPU.with_suffix(".json").read_text(encoding="utf-8"))["conversion"]
    verbs = {each["verb"]: 1e3 * each["seconds"] for each in times if each["model"] == "BERT-base"}
    return [
        f"takes {bert} of stock's for BERT-base and {vit} for ViT-B/16",
        f"`torch.compile` {block['float32']:.2f} in fp32 and {block['bfloat16']:.2f} in bf16",
        f"of BERT-base take {verbs['convert']:.0f} and {verbs['relu_ize']:.0f} ms",
    ]


def calls_on_cuda() -> list[str]:
    """Calls from Python, and training steps."""
    rows = read(benchmarks.CUDA)
    calls = [row for row in rows if (row["section"], row["what"]) == ("activation", "λ-GELU")]
    ours = min(float(row["time"]) * float(row["stock_ms"]) for row in calls)
    stock = min(float(row["stock_ms"]) for row in calls)
    few = [float(row["time"]) for row in calls if row["shape"] != "16384×4096"]
    steps = {
        dtype: [row for row in rows if row["section"] == "training step" and row["dtype"] == dtype]
        for dtype in benchmarks.SHORT
    }
    (whole,) = {f"{float(row['time']):.2f}" for row in steps["float32"]}
    bert, vit = (benchmarks.ratio(row) for row in steps["bfloat16"])
    return [
        f"took {ours:.2f} ms at least, `F.gelu`'s {stock:.2f}",
        f"with 17M elements or fewer the ratio is {min(few):.1f} to {max(few):.1f}",
        f"took {whole} of stock's in fp32; in bf16, where the device waits for launches, {bert} and {vit}",
    ]


def streamed() -> list[str]:
    rows = [row for row in read(benchmarks.STREAMING) if row["way"] == "streamed"]
    (block,) = {float(row["block_mb"]) for row in rows}
    (needed,) = {2 * block + float(row["moments_mb"]) + float(row["batch_mb"]) for row in rows}
    share = sum(float(row["read"]) for row in rows) / sum(float(row["seconds"]) for row in rows)
    return [
        f"with random weights in fp32, in blocks of {block:.0f} MB",
        f"Two blocks, the sums of the refit and a batch are {needed:.0f} MB",
        f"Reading the weights again and again took {100 * share:.0f} % of the time",
    ]


# ------------------------------------------------------------------------------------------------------ how near it comes


def ratios() -> dict[str, float]:
    """Perplexity of SmolLM2 over the smooth one's by variant, mean of the draws."""
    rows = [row for row in read(hinges.RESULTS) if row["task"] == "smollm2"]
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(float(row["substituted"]) / float(row["smooth"]))
    return {variant: mean(values) for variant, values in found.items()}


def one_relu() -> list[str]:
    (smooth,) = {float(row["smooth"]) for row in read(hinges.RESULTS) if row["task"] == "smollm2"}
    return [f"SmolLM2-135M's perplexity goes from {smooth:.1f} to {smooth * ratios()['k1']:.1f}"]


def several_relus() -> list[str]:
    near = ratios()
    return [
        f"has {near['k1']:.2f} × the perplexity of SiLU with one ReLU per gate, {near['budget1.25']:.2f} × in layers "
        f"a quarter wider, {near['k2']:.2f} × with two and {near['k3']:.2f} × with three"
    ]


def steps_bring() -> list[str]:
    rows = {row["variant"]: row for row in read(distilled.RESULTS)}
    before, after, smooth = (float(rows["k1"][name]) for name in ("refit", "distilled", "smooth"))
    return [
        f"60 steps took the perplexity from {before:.1f} to {after:.1f} (SiLU's is {smooth:.1f})",
        f"two ReLUs per gate from {float(rows['k2']['refit']):.1f} to {float(rows['k2']['distilled']):.1f}",
    ]


def first_steps_lead() -> list[str]:
    high, low = ((power(float(row["rate"])), float(row["after"])) for row in read(first_steps.RESULTS))
    (before,) = {f"{float(row['before']):.2f}" for row in read(first_steps.RESULTS)}
    return [f"from {before} nats a token: to {high[1]:.3f} with a peak of {high[0]}, and {low[1]:.3f} with {low[0]}"]


def images() -> list[str]:
    """Of DINOv2-small on Fashion-MNIST."""
    scores = {
        recipe: mean(tasks["fashion"].values())
        for recipe, tasks in report.accuracies(run.RESULTS).items()
        if "fashion" in tasks
    }
    gelu = scores["gelu"]
    return [
        f"Fashion-MNIST from {gelu:.1f} % to {scores['swap']:.1f} %. A refit of the biases alone ended "
        f"{gelu - scores['bias_after']:.1f} points below GELU, least squares {gelu - scores['least_squares_after']:.1f}"
    ]


def block_of_minilm() -> list[str]:
    (row,) = (row for row in read(DOWNSTREAM) if row["what"].startswith("FFN of MiniLM, 384–1536–384, 4 tokens"))
    assert row["relu"] == "4 robust, all by bounds and search", "the sentence says that these decide all four"
    epsilon = row["what"].split("ε = ")[1].split(":")[0]
    return [f"bounds and a search decide four rows at ε = {epsilon}"]


# -------------------------------------------------------------------------------------------------------- what was counted


def base_models() -> list[str]:
    counts = Counter(row["verdict"] for row in read(coverage.RESULTS) if row["auto"] == "AutoModel")
    built = counts.total() - counts["not built"]
    assert set(counts) == {"exact", "refused", "no GELU or SiLU", "not reached", "not built"}, "the sentence has no others"
    return [
        f"Of the {built} base models of transformers",
        f"{counts['exact']} come out exact, {counts['refused']} are refused with the reason, {counts['no GELU or SiLU']} "
        f"have neither GELU nor SiLU, and of {counts['not reached']} the test's inputs do not reach",
    ]


def proven_folders() -> list[str]:
    rows = read(proofs.RESULTS)
    proven = [row for row in rows if row["verdict"] == "proven"]
    assert all(float(row["in_memory"]) == 0.0 for row in proven), "the sentence says to the bit"
    moved = [float(row["folder"]) for row in proven if float(row["folder"]) > 0.0]
    within = power(next_power(max(moved)))
    return [f"{len(proven)} of {len(rows)} hold", f"from their folders {len(moved)} of them within {within}"]


def folded() -> list[str]:
    """The lines between the tables of `scripts.architectures.run --table`, and the first one of the wider layers'."""
    made = [*coverage.table(read(coverage.RESULTS)).splitlines(), *wider.table(read(wider.RESULTS)).splitlines()]
    return [line for line in made if line and not line.startswith("|")]


def cells() -> list[str]:
    return [f"[{len(matrix.rows_in(matrix.RESULTS))} ways]"]


def trainers_agree() -> list[str]:
    rows = [row for row in matrix.rows_in(matrix.RESULTS) if (row["part"], row["precision"]) == ("trainers", "fp32")]
    return [f"equal to {raised(next_power(max(float(row['figure']) for row in rows)))}"]


def questions() -> list[str]:
    networks = [row["network"] for row in read(agreement.RESULTS)]
    return [f"were asked {len(networks)} questions, {networks.count('random')} of them about random networks"]


def orders_of_optimizers() -> list[str]:
    """Of the ResNet's layers by λ: how like SGD's orders are, over seeds and to AdamW's."""
    rows = robustness.profiles(robustness.judged_rows(robustness.RESULTS)).splitlines()
    cells = next(row for row in rows if row.startswith("| resnet | SGD")).split(" | ")
    between, to_adamw = (cells[column].split()[0] for column in (4, 5))
    return [f"SGD's is shared by seeds ({between}) and is another than AdamW's ({to_adamw})"]


MEASURED: Sentences = {
    "robustness.csv": ("docs/study.md", orders_of_optimizers),
    "refit-parts.csv": ("docs/how-it-works.md", refit_cost),
    "refit-parts.csv, again": ("docs/how-to/language-model.md", refit_cost_again),
    "benchmark-cpu": ("docs/cost.md", steps_on_cpu),
    "benchmark-cuda": ("docs/cost.md", calls_on_cuda),
    "streaming-cpu": ("docs/how-to/larger-than-memory.md", streamed),
    "hinges.csv in README": ("README.md", one_relu),
    "hinges.csv": ("docs/how-to/language-model.md", several_relus),
    "distilled.csv": ("docs/how-to/language-model.md", steps_bring),
    "first_steps.csv": ("docs/how-to/language-model.md", first_steps_lead),
    "first_steps.csv in the study": ("docs/study.md", first_steps_lead),
    "study.csv, images": ("docs/how-to/vision.md", images),
    "downstream.csv, a block": ("docs/how-to/verification.md", block_of_minilm),
    "coverage.csv": ("docs/index.md", base_models),
    "proofs.csv": ("docs/coverage.md", proven_folders),
    "coverage.csv, lines between": ("docs/coverage.md", folded),
    "matrix": ("README.md", cells),
    "trainers.csv": ("docs/how-to/other-trainers.md", trainers_agree),
    "agreement.csv": ("docs/how-to/verification.md", questions),
}
