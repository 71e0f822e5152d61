"""What `distill` does: the folders become models, these a trainer, and what has learned a folder.

Imports torch: the command imports it when it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

import hf_lambda_gelu as hlg

from ..training.resuming import last_good  # not by inner.py: other commands need no Trainer
from ..training.teacher import check_fits
from .data import Data, Examples, batches
from .inner import REPORT_NAME, check_relu, smooth_modules, unfinished_folder
from .models import is_hub_name, loaded, processors
from .work import UsageError

_IDENTITY = "made_of.json"
_LOGITS = 1 << 25  # elements of a batch's logits, 128 MiB: several times as many are in memory


class Items(Dataset[Any]):
    """Examples as they were read; the collator makes inputs of them."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@dataclass(frozen=True)
class Distilling:
    """The options of the command."""

    student: str
    teacher: str
    output: Path
    data: Data
    steps: int
    learning_rate: float
    lora: bool
    freeze: tuple[str, ...]
    device: str
    card: dict[str, str | None]
    trust_remote_code: bool

    def done(self, found: Examples, student: Path, teacher: Path) -> tuple[dict[str, Any], str]:
        """Learn and save; what is to be printed, as an object and as text.

        Raises:
            UsageError, ValueError: what can be known to fail, before a step is made.
        """
        model, smooth = self.checked(student, teacher)
        carried = processors(student, self.trust_remote_code)
        collate = self.collator(found, model, student)
        learned, held_out = halves(found.items)
        dtype = model.dtype
        model = self.learning(model.float())  # small steps are lost in half precision
        with unfinished_folder(self.output) as folder:
            arguments = self.arguments(folder, model)
            resumed = self.left_in(folder, arguments, student, teacher)
            trainer = hlg.DistillationTrainer(
                model, arguments, teacher=smooth, train_dataset=Items(learned), data_collator=collate
            )
            apart = {"before": divergence(trainer, held_out)}
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            apart["after"] = divergence(trainer, held_out)
            network: Any = model.merge_and_unload() if self.lora else model
            details = self.details(student, len(held_out), apart)
            network = network.eval().to("cpu", dtype)
            saved = hlg.save_relu_pretrained(
                network, self.output, processor=carried, details=details, trust_remote_code=self.trust_remote_code
            )
        value = {
            "folder": saved,
            "steps": self.steps,
            "resumed_from": None if resumed is None else int(resumed.name.rpartition("-")[2]),
            "examples": {"learned": len(learned), "held_out": len(held_out)},
            "divergence": apart,
        }
        worse = apart["before"] is not None and apart["after"] is not None and apart["after"] > apart["before"]
        warning = "\nThey are further apart than before: lower --learning-rate, or give more examples" if worse else ""
        return value, f"{self.said(len(held_out), apart)}\nsaved in {str(saved)!r}{warning}"

    def checked(self, student: Path, teacher: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Both models on the CPU; UsageError or ValueError if they cannot be what they are to be."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("distill is one process: for several, launch a script of your own with DistillationTrainer")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise UsageError(f"--device {self.device}: expected cpu or cuda")
        if student.resolve() == teacher.resolve():
            raise UsageError(f"STUDENT and TEACHER are both {str(student)!r}: TEACHER is the smooth model it was made from")
        model = loaded(student, self.trust_remote_code)
        try:
            check_relu(model)
        except ValueError as error:
            raise UsageError(f"STUDENT, which comes first, is {self.student!r}, no ReLU network: {error}") from error
        modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if unknown := [name for name in self.freeze if name not in modules]:
            raise UsageError(
                f"--freeze {unknown[0]}: no module of the student is called so. Expected the last part of a name, of "
                f"{', '.join(linear_names(model))}"
            )
        left = smooth_modules(model)
        if left:
            raise UsageError(f"the student has smooth modules that no config governs, from {left[0].name} on: not distilled")
        smooth = loaded(teacher, self.trust_remote_code)
        check_fits(model, smooth)
        words = [tokenizer_vocabulary(processors(folder, self.trust_remote_code)) for folder in (student, teacher)]
        if None not in words and words[0] != words[1]:
            raise UsageError(f"the tokenizers of {self.student!r} and {self.teacher!r} have other vocabularies")
        return model, smooth

    def collator(self, found: Examples, model: PreTrainedModel, folder: Path) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """Examples → what both models take; for a masked language model with 15 % of the tokens masked, which then count."""
        plain: Callable[[Sequence[Any]], dict[str, Any]] = batches(
            found, self.data, model, folder, self.trust_remote_code
        ).collate
        tokens = next((p for p in processors(folder, self.trust_remote_code) if hasattr(p, "mask_token")), None)
        if found.kind != "text" or "ForMaskedLM" not in type(model).__name__ or tokens is None:
            return plain
        from transformers import DataCollatorForLanguageModeling

        masking = DataCollatorForLanguageModeling(tokens, mlm_probability=0.15)

        def masked(items: Sequence[Any]) -> dict[str, Any]:
            batch = plain(items)
            ids, labels = masking.torch_mask_tokens(batch["input_ids"])
            return {**batch, "input_ids": ids, "labels": labels}

        return masked

    def learning(self, model: PreTrainedModel) -> Any:
        """The model, of which what is to learn wants gradients; with --lora, PEFT's around it."""
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in self.freeze:
                module.requires_grad_(False)
        if not self.lora:
            return model
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UsageError("--lora needs peft: pip install peft") from error
        torch.manual_seed(0)
        frozen = list(self.freeze) or None
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=frozen))

    def arguments(self, folder: Path, model: Any) -> TrainingArguments:
        """Of the run: a batch in pieces whose logits fit memory, a checkpoint after each sixth of the steps."""
        size, vocabulary = self.data.batch_size, getattr(model.config.get_text_config(), "vocab_size", 1) or 1
        pieces = [n for n in range(1, size + 1) if size % n == 0 and n * self.data.max_length * vocabulary <= _LOGITS]
        micro = max(pieces, default=1)
        made = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            learning_rate=self.learning_rate,
            warmup_steps=0.1,
            weight_decay=0.0,
            logging_steps=max(1, self.steps // 10),
            save_steps=max(1, self.steps // 6),
            save_total_limit=1,
            seed=0,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=self.device != "cpu",
            use_cpu=self.device == "cpu",
        )
        if made.device.type != self.device.partition(":")[0]:
            raise UsageError(f"--device {self.device} cannot be used here: there is {made.device.type}")
        return made

    def left_in(self, folder: Path, arguments: TrainingArguments, student: Path, teacher: Path) -> Path | None:
        """The checkpoint that a killed command with the same options, models and data left; anything else goes."""
        options = {name: value for name, value in asdict(self).items() if name != "card"}
        files = [state(path) for path in (student, teacher, Path(self.data.source or "").expanduser())]
        identity = hashlib.sha256(json.dumps([options, files, torch.__version__], default=str).encode()).hexdigest()
        record = folder / _IDENTITY
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == identity:
            good = last_good(folder, arguments)
            if good is not None:
                print(f"going on from {good.name}, which a killed command left", file=sys.stderr)
            return good
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        record.write_text(json.dumps(identity), encoding="utf-8")
        return None

    def details(self, student: Path, held_out: int, apart: Mapping[str, float | None]) -> hlg.CardDetails:
        """What the card says: what the student's own said of its origin, and what came after it."""
        record = student / REPORT_NAME
        before = json.loads(record.read_text(encoding="utf-8")).get("details", {}) if record.is_file() else {}
        given: dict[str, Any] = {name: self.card[name] or before.get(name) for name in ("base_model", "license")}
        if given["base_model"] is None and is_hub_name(self.teacher) and not Path(self.teacher).exists():
            given["base_model"] = self.teacher
        arguments = {"learning_rate": self.learning_rate, "steps": self.steps, "batch_size": self.data.batch_size}
        return hlg.CardDetails(
            **given,
            dataset=self.card["dataset"],
            language=before.get("language"),
            arguments={**arguments, "lora": self.lora, "frozen": " ".join(self.freeze) or "nothing"},
            notes=f"After the substitution it learned from the smooth model's predictions: {self.said(held_out, apart)}.",
        )

    def said(self, held_out: int, apart: Mapping[str, float | None]) -> str:
        """What was done and what it brought, in a line."""
        text = f"{self.steps} steps of {self.data.batch_size} examples"
        if apart["before"] is None or apart["after"] is None:
            return text
        moved = f"{apart['before']:.4g} → {apart['after']:.4g}"
        return f"{text}; divergence from the smooth model on {held_out} examples held out: {moved}"


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of modules with a weight matrix, each once."""
    matrices = (name for name, p in model.named_parameters() if p.dim() == 2)
    return list(dict.fromkeys(name.split(".")[-2] for name in matrices if "." in name))


def halves(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Examples to learn on, and a fifth of them, 32 at most, that are held out."""
    chosen = set(random.Random(0).sample(range(len(items)), min(32, len(items) // 5)))
    return [items[i] for i in range(len(items)) if i not in chosen], [items[i] for i in sorted(chosen)]


def divergence(trainer: hlg.DistillationTrainer, items: Sequence[Any]) -> float | None:
    """The loss on these examples, None without any; the draw of masks is the same each time."""
    if not items:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(trainer.evaluate(Items(items))["eval_loss"])


def tokenizer_vocabulary(found: Iterable[Any]) -> dict[str, int] | None:
    """{token: its number} of the tokenizer among processors; None where there is none."""
    for each in found:
        tokenizer = getattr(each, "tokenizer", each)
        if hasattr(tokenizer, "get_vocab"):
            return dict(tokenizer.get_vocab())
    return None


def state(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file there; nothing where there is none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
