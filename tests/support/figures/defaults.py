"""Sentences of the pages that say what the code computes or takes by default: each made from the code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

import hf_lambda_gelu as hlg
from hf_lambda_gelu.activation.bases import BASES
from hf_lambda_gelu.activation.hardness import DEFAULT_RELATIVE_TOLERANCE, DEFAULT_TOLERANCE
from hf_lambda_gelu.cli.data import Data
from hf_lambda_gelu.downstream.onnx import comparison, int8
from hf_lambda_gelu.downstream.verification import robustness
from hf_lambda_gelu.surgery.hinges.minimax import minimax
from scripts.architectures import hinges as wider
from scripts.architectures import run as coverage
from scripts.matrix import comparison as optimizers
from scripts.matrix import engines, trainers, twin

from .sentences import Sentences
from .wording import percent, power, raised

FOLDED = 2.0**14  # λ of activations that no config can name
TARGET = f"{hlg.target_hardness():.2f}"


def distances() -> list[str]:
    return [f"than {BASES['gelu'].sup_error:.2f}/λ from ReLU (a SiLU {BASES['silu'].sup_error:.2f}/λ)"]


def folded() -> list[str]:
    gelu, silu = (power(hlg.sup_error(FOLDED, base)) for base in ("gelu", "silu"))
    return [f"within {gelu} of ReLU, in units of the pre-activation (SiLU: {silu})"]


def without_data() -> list[str]:
    four, six, silu_four, silu_six = (minimax(base, count).bound for base in ("gelu", "silu") for count in (4, 6))
    return [f"{four:.4f} for GELU at four, {six:.4f} at six; {silu_four:.4f} and {silu_six:.4f} for SiLU"]


def trainer_defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(hlg.LambdaGELUTrainingArguments)}


def arguments() -> list[str]:
    """Of the trainer's table: the arguments whose defaults are numbers."""
    defaults = trainer_defaults()
    own = {name: value for name, value in defaults.items() if name.startswith(("hardness_", "sparsity_"))}
    return [f"`{name}` | {value:g} |" for name, value in own.items() if isinstance(value, int | float)]


def reference_of_the_study() -> list[str]:
    rate, hold = (trainer_defaults()[f"hardness_{name}"] for name in ("learning_rate", "hold"))
    return [
        f"to {hlg.target_hardness() * DEFAULT_TOLERANCE:.3f} / ε",
        f"its rate of {rate:g} are ours",
        f"Hold {hold:g} and ε = {DEFAULT_TOLERANCE:g} are the reference of what is ramped, a rate of {rate:g}",
    ]


def data_options() -> list[str]:
    return [f"`--{name.replace('_', '-')}` | {getattr(Data, name)} |" for name in ("samples", "batch_size", "max_length")]


def rate() -> list[str]:
    return [f"{trainer_defaults()['hardness_learning_rate']:g} by default"]


def bf16() -> float:
    """The largest relative error of rounding to bf16."""
    return torch.finfo(torch.bfloat16).eps / 2


def bytes_left(zeros: float = 0.9) -> list[str]:
    """Of two matrices W₁ is read whole, of three W₁; of the others the share that is not skipped."""
    plain, gated = 2 / (1 + 1 - zeros), 3 / (1 + 2 * (1 - zeros))
    return [
        "an FFN can become 2 times as fast at most, a gated one 3 times, however many zeros there are; "
        f"at {percent(zeros)} the bytes that are left allow {plain:.1f} and {gated:.1f}"
    ]


def bounds_of_cells() -> list[str]:
    (fp32,) = {optimizers.BOUND, engines.BOUNDS["fp32"][0], trainers.BOUND["fp32"]}
    return [
        f"is within {raised(fp32)} of the twin's, relative; in bf16 within {raised(engines.BOUNDS['bf16'][0])} for "
        f"engines and {raised(trainers.BOUND['bf16'])} for trainers"
    ]


def starts() -> list[str]:
    *first, last = (f"{start:g}" for start in twin.STARTS)
    return [f"from λ = {', '.join(first)} and {last}"]


COMPUTED: Sentences = {
    "sup_error": ("docs/how-to/verification.md", distances),
    "sup_error in concepts": ("docs/concepts.md", lambda: [f"at most {BASES['gelu'].sup_error:.2f}/λ"]),
    "sup_error at the start": ("docs/index.md", lambda: [f"the bound {BASES['gelu'].sup_error:.2f}/λ"]),
    "sup_error of what is folded": ("docs/coverage.md", folded),
    "… at the start": ("docs/index.md", lambda: [f"within {power(hlg.sup_error(FOLDED))} of ReLU"]),
    "target_hardness": ("docs/concepts.md", lambda: [f"{TARGET} by default"]),
    "target_hardness of a text model": ("docs/how-to/encoder.md", lambda: [f"({TARGET} at ε = {DEFAULT_TOLERANCE:g})"]),
    "hardness_tolerance": ("docs/paper.md", lambda: [f"ε = {DEFAULT_TOLERANCE:g} follows what is reported of the paper"]),
    "the reference of the study": ("docs/study.md", reference_of_the_study),
    "hardness_learning_rate": ("docs/how-to/own-loop.md", rate),
    "hardness_learning_rate elsewhere": ("docs/how-to/other-trainers.md", rate),
    "the trainer's arguments": ("docs/reference/training.md", arguments),
    "options of the data": ("docs/how-to/command-line.md", data_options),
    "--tolerance": ("docs/how-to/command-line.md", lambda: [f"output by {percent(DEFAULT_RELATIVE_TOLERANCE)}"]),
    "minimax": ("docs/how-to/language-model.md", without_data),
    "rounding to bf16": ("docs/how-to/engines.md", lambda: [f"to {percent(round(bf16(), 3))} in bf16"]),
    "bytes that are read": ("docs/how-to/sparsity.md", bytes_left),
    "tolerance of ONNX": (
        "docs/how-to/onnx.md",
        lambda: [f"may differ by {power(comparison.TOLERANCE)} of their largest value"],
    ),
    "warning of INT8": ("docs/how-to/onnx.md", lambda: [f"warns beyond {percent(int8._TOO_MUCH)}"]),
    "slack of solvers": (
        "docs/how-to/verification.md",
        lambda: [f"can be below {power(robustness._SLACK)} of the logits' size"],
    ),
    "exactness": (
        "docs/coverage.md",
        lambda: [f"(≤ {power(coverage.EXACT)} relative", f"reload likewise: ≤ {power(coverage.EXACT)}"],
    ),
    "rounding of wider layers": ("docs/coverage.md", lambda: [f"within {power(wider.ROUNDING)} of the largest output"]),
    "bounds of cells": ("docs/matrix.md", bounds_of_cells),
    "bounds of engines": ("docs/how-to/engines.md", lambda: [f"agree to {power(engines.BOUNDS['fp32'][0])} in fp32"]),
    "bound of gradients": ("docs/matrix.md", lambda: [f"within {percent(optimizers.GRADIENT_BOUND)} of its own"]),
    "starts of cells": ("docs/matrix.md", starts),
}
