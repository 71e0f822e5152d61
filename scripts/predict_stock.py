"""Judge a saved classifier by stock transformers alone: accuracy of `pipeline()` on a labelled data set.

    python -m scripts.predict_stock runs/sst2/relu --dataset_name nyu-mll/glue --dataset_config_name sst2 --split validation

Nothing of hf_lambda_gelu is imported, and its import is blocked: what this prints is what a stranger gets.
"""

from __future__ import annotations

import sys

sys.modules["hf_lambda_gelu"] = None  # type: ignore[assignment]

import argparse
import json

import datasets
from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.predict_stock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--dataset_name", required=True, help="Hub name or local folder")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="test")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label", help="a ClassLabel column, with the model's own label names")
    parser.add_argument("--max_samples", type=int)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that lies beside the model")
    options = parser.parse_args()

    data = datasets.load_dataset(options.dataset_name, options.dataset_config_name, split=options.split)
    if options.max_samples is not None:
        data = data.select(range(min(options.max_samples, len(data))))
    images = options.image_column in data.column_names
    column = options.image_column if images else options.text_column
    task = "image-classification" if images else "text-classification"
    classify = pipeline(task, model=options.model, trust_remote_code=options.trust_remote_code)
    if images:
        inputs = [image.convert("RGB") for image in data[column]]
        answers = [answer[0]["label"] for answer in classify(inputs, batch_size=options.batch_size, top_k=1)]
    else:
        answers = [
            answer["label"] for answer in classify(list(data[column]), batch_size=options.batch_size, truncation=True)
        ]
    names = data.features[options.label_column].names
    right = sum(names[label] == answer for label, answer in zip(data[options.label_column], answers, strict=True))
    print(json.dumps({"model": options.model, "samples": len(answers), "accuracy": right / len(answers)}))


if __name__ == "__main__":
    main()
