"""Fine-tune a pretrained image classifier into a ReLU network.

    python -m scripts.finetune_image --model_name_or_path facebook/dinov2-small \
        --dataset_name ethz/food101 --output_dir runs/food --num_train_epochs 3 --learning_rate 5e-5

A local dataset: --dataset_name FOLDER, of parquet files or of one folder of images per class. On two processes:
accelerate launch --num_processes 2 -m scripts.finetune_image … . The output folder then holds results.json, hardness.png
and the folder relu/ that stock transformers loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, Trainer, set_seed

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
class ImageArguments(DataArguments):
    """Data of image classification."""

    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize to so many pixels square, uncropped; by default as the processor does."},
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(
        (ModelArguments, ImageArguments, LambdaGELUTrainingArguments), prog="python -m scripts.finetune_image"
    )
    model_arguments, data, arguments = parser.parse_args_into_dataclasses(argv)
    arguments.remove_unused_columns = False  # the image column is what the transform below reads
    set_seed(arguments.seed)  # the same head, data order and dropout for every activation that is compared
    train, evaluation = load_splits(data, arguments.data_seed if arguments.data_seed is not None else arguments.seed)
    if data.image_column not in train.column_names:
        raise ValueError(f"no column {data.image_column!r} in {train.column_names}: name it with --image_column")

    trusted = model_arguments.trust_remote_code
    processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path, trust_remote_code=trusted)
    if data.image_size is not None:
        # set on the processor, so that the saved one prepares images as the training did
        processor.size = {"height": data.image_size, "width": data.image_size}
        processor.do_center_crop = False
    names = train.features[data.label_column].names
    model = AutoModelForImageClassification.from_pretrained(
        model_arguments.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        ignore_mismatched_sizes=True,
        trust_remote_code=trusted,
    )
    prepare(model, model_arguments)

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[data.image_column]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows[data.label_column]}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    def build(cls: type[Trainer]) -> Trainer:
        return cls(
            model=model,
            args=arguments,
            train_dataset=train.with_transform(transform),
            eval_dataset=evaluation.with_transform(transform),
            processing_class=processor,
            data_collator=collate,
            compute_metrics=classification_metrics(data.metric),
        )

    return run(build, model_arguments, data, processor)


if __name__ == "__main__":
    main()
    leave_process_group()
