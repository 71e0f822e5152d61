"""Fine-tune a pretrained text classifier into a ReLU network.

    python -m scripts.finetune_text --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence \
        --output_dir runs/sst2 --num_train_epochs 3 --learning_rate 5e-5

Local csv, json or parquet files: --train_file train.csv --validation_file test.csv. On two processes:
accelerate launch --num_processes 2 -m scripts.finetune_text … . The output folder then holds results.json, hardness.png, and
the folder relu/ that stock transformers loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    set_seed,
)

from hf_lambda_gelu import LambdaGELUTrainingArguments
from scripts.finetuning import (
    DataArguments,
    ModelArguments,
    classification_metrics,
    leave_process_group,
    load_splits,
    prepare,
    run,
)


@dataclass
class TextArguments(DataArguments):
    """Data of text classification."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, for pair tasks."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(
        (ModelArguments, TextArguments, LambdaGELUTrainingArguments), prog="python -m scripts.finetune_text"
    )
    model_arguments, data, arguments = parser.parse_args_into_dataclasses(argv)
    set_seed(arguments.seed)  # the same head, data order and dropout for every activation that is compared
    train, evaluation = load_splits(data, arguments.data_seed if arguments.data_seed is not None else arguments.seed)
    for option in ("text_column", "text_pair_column"):
        column = getattr(data, option)
        if column is not None and column not in train.column_names:
            raise ValueError(f"no column {column!r} in {train.column_names}: name it with --{option}")

    trusted = model_arguments.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path, trust_remote_code=trusted)
    # set on the tokenizer, so that the saved one cuts texts as the training did
    tokenizer.model_max_length = min(tokenizer.model_max_length, data.max_seq_length)
    names = train.features[data.label_column].names
    model = AutoModelForSequenceClassification.from_pretrained(
        model_arguments.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        trust_remote_code=trusted,
    )
    prepare(model, model_arguments)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[c] for c in (data.text_column, data.text_pair_column) if c]
        return {**tokenizer(*texts, truncation=True), "labels": rows[data.label_column]}

    with arguments.main_process_first(desc="tokenizing"):
        train = train.map(tokenize, batched=True, remove_columns=train.column_names, desc="Tokenizing the training set")
        evaluation = evaluation.map(
            tokenize, batched=True, remove_columns=evaluation.column_names, desc="Tokenizing the evaluation set"
        )

    def build(cls: type[Trainer]) -> Trainer:
        return cls(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=classification_metrics(data.metric),
        )

    return run(build, model_arguments, data, tokenizer)


if __name__ == "__main__":
    main()
    leave_process_group()
