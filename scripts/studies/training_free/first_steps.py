"""The first steps from the smooth model's predictions, at several rates: do they lead nearer? SmolLM2, two ReLUs per gate.

    python -m scripts.studies.training_free.hinges --tasks smollm2 --variants k2 --seeds 0 --keep runs/hinges    # first
    python -m scripts.studies.training_free.first_steps runs/hinges/smollm2-k2-seed0 --rates 2e-5 6e-6
    python -m scripts.studies.training_free.first_steps runs/hinges/smollm2-k2-seed0 --rates 5e-5 --freeze up_proj down_proj

Twelve steps of AdamW on two windows of 256 tokens each, the rate rising over three and falling to 0; KL(smooth ‖ ReLU) a
token, in nats, on six windows of the test splits, before and after. Rows go to results/first_steps.csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lambda_gelu.checkpoints.card import package_versions
from scripts.relu_ize_lm import Arguments, windows
from scripts.tools.assets import asset
from scripts.tools.tables import append

RESULTS = Path(__file__).parents[1] / "results" / "first_steps.csv"
FIELDS = ("variant", "rate", "frozen", "steps", "windows", "before", "after", "versions")
STEPS, WINDOWS, WARM = 12, 2, 3


def divergence(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits.log_softmax(-1)
    given = student(input_ids=ids).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).mean()


@torch.no_grad()
def judged(teacher: PreTrainedModel, student: PreTrainedModel, test: Tensor) -> float:
    return statistics.fmean(float(divergence(teacher, student, part)) for part in test.split(WINDOWS))


def steps(teacher: PreTrainedModel, student: PreTrainedModel, train: Tensor, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], weight_decay=0.0)
    for step, ids in enumerate(train.split(WINDOWS)[:STEPS]):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM) * (1.0 - step / STEPS)
        divergence(teacher, student, ids).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.studies.training_free.first_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the ReLU network that the study of hinges kept")
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-5, 6e-6])
    parser.add_argument("--freeze", nargs="+", default=[], metavar="MODULE", help="what does not learn, such as down_proj")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asset("smollm2"))
    train, test = windows(Arguments(), tokenizer, "train", 256 * 60), windows(Arguments(), tokenizer, "test", 256 * 6)
    teacher = AutoModelForCausalLM.from_pretrained(asset("smollm2")).eval()
    refit = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    before = judged(teacher, refit, test)
    for rate in options.rates:
        student = copy.deepcopy(refit)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not any(f".{module}." in name for module in options.freeze))
        steps(teacher, student, train, rate)
        made = (options.folder.name, rate, " ".join(options.freeze), STEPS, WINDOWS, f"{before:.4f}")
        row: dict[str, object] = dict(zip(FIELDS, made, strict=False))
        row |= {"after": f"{judged(teacher, student, test):.4f}", "versions": " ".join(package_versions().values())}
        append(options.results, FIELDS, [row])
        print(row, flush=True)


if __name__ == "__main__":
    main()
