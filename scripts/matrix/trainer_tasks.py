"""What each trainer is given: a tiny model without dropout, its arguments, data; nothing of it comes from the Hub."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

ROWS = 32
_VOCABULARY = "[PAD] [UNK] [CLS] </s> a quiet loud long film that stays leaves with you me two hours felt like four"
WORDS = _VOCABULARY.split()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS[4:], 6), 0, 700_000, 20_011)][:ROWS]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], padding_side="left", **special
    )


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = build()
            with torch.no_grad():  # at the usual 0.02, activations are nearly linear, and λ has no gradient to speak of
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.25)
            return model

    return built


def _bert() -> dict[str, Any]:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
    return {**SIZES, **still, "vocab_size": len(WORDS)}


@_seeded
def classifier() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**_bert()))


@_seeded
def decoder() -> nn.Module:
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **tokens, vocab_size=len(WORDS), max_position_embeddings=32))


@_seeded
def encoder_decoder() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": len(WORDS)}
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, feed_forward_proj="gated-gelu", dropout_rate=0.0))


@_seeded
def embedder() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers reads its parts from a folder
        BertModel(BertConfig(**_bert())).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        words = Transformer(folder, max_seq_length=16)
    return SentenceTransformer(modules=[words, Pooling(SIZES["hidden_size"])], device="cpu")


def classified() -> list[dict[str, torch.Tensor]]:
    """Rows of tokens, with a label that can be learned."""
    rows = [tokenizer()(text)["input_ids"] for text in TEXTS]
    return [{"input_ids": torch.tensor(row), "labels": torch.tensor(row[0] % 2)} for row in rows]


def _summaries() -> dict[str, Any]:
    known = tokenizer()
    rows = Dataset.from_dict(dict(known(TEXTS, text_target=[text[:14].rpartition(" ")[0] for text in TEXTS])))
    return {"train_dataset": rows, "data_collator": DataCollatorForSeq2Seq(known), "processing_class": known}


def _texts() -> dict[str, Any]:
    return {"train_dataset": Dataset.from_dict({"text": TEXTS}), "processing_class": tokenizer()}


def _preferences() -> dict[str, Any]:
    halves = {"prompt": [t[:10] for t in TEXTS], "chosen": [t[10:] for t in TEXTS], "rejected": [t[:-10] for t in TEXTS]}
    return {"train_dataset": Dataset.from_dict(halves), "processing_class": tokenizer(), "ref_model": decoder()}


def _reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text.split()) & {"quiet", "long", "four"})) - 0.1 * len(text.split()) for text in completions]


def _prompts() -> dict[str, Any]:
    rows = Dataset.from_dict({"prompt": [text[:12] for text in TEXTS]})
    return {"train_dataset": rows, "processing_class": tokenizer(), "reward_funcs": _reward}


def _pairs() -> dict[str, Any]:
    scores = [float(len(set(first.split()) & set(TEXTS[-i].split()))) / 6 for i, first in enumerate(TEXTS)]
    columns = {"first": TEXTS, "second": [TEXTS[-i] for i in range(ROWS)], "score": scores}
    return {"train_dataset": Dataset.from_dict(columns), "loss": CoSENTLoss}


@dataclass(frozen=True)
class Task:
    """A trainer, and what it is given.

    Attributes:
        model: makes the model, always the same.
        trainer, arguments: the classes.
        given: keyword arguments of the trainer.
        options: training arguments.
    """

    model: Callable[[], nn.Module]
    trainer: type[Trainer]
    arguments: type[TrainingArguments]
    given: Callable[[], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "Trainer": Task(classifier, Trainer, TrainingArguments, lambda: {"train_dataset": classified()}),
    "Seq2SeqTrainer": Task(encoder_decoder, Seq2SeqTrainer, Seq2SeqTrainingArguments, _summaries),
    "SFTTrainer": Task(decoder, SFTTrainer, SFTConfig, _texts, {"max_length": 16}),
    "DPOTrainer": Task(decoder, DPOTrainer, DPOConfig, _preferences, {"max_length": 16}),
    "GRPOTrainer": Task(
        decoder, GRPOTrainer, GRPOConfig, _prompts, {"num_generations": 4, "max_completion_length": 5, "beta": 0.0}
    ),
    "SentenceTransformerTrainer": Task(embedder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, _pairs),
}
