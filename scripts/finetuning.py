"""What finetune_text.py and finetune_image.py share: arguments, metrics, and the way from training to a ReLU checkpoint."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

# accelerate imports it where it is installed. Imported while there is a process group, its functions have that for a
# default, and keep it alive.
with contextlib.suppress(Exception):
    import deepspeed  # noqa: F401

import datasets
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import package_versions
from hf_lambda_gelu.checkpoints.redaction import stated_command
from hf_lambda_gelu.training.publish import stated_arguments, substitute_trained
from hf_lambda_gelu.training.resuming import checkpoint_to_resume

RESULTS_NAME = "results.json"
# of TrainingArguments, the options that a card's command may state: what decides the result, and nothing of an account
STATED = set(
    """
    output_dir seed data_seed num_train_epochs max_steps learning_rate weight_decay max_grad_norm label_smoothing_factor
    lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps gradient_checkpointing bf16 fp16 tf32
    torch_compile use_cpu eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit logging_steps
    logging_strategy load_best_model_at_end metric_for_best_model greater_is_better dataloader_num_workers
    dataloader_drop_last group_by_length ddp_backend report_to disable_tqdm push_to_hub
    """.split()  # noqa: SIM905 - a list would take forty lines
)


@dataclass
class ModelArguments:
    """Which model, and which activation it is fine-tuned with."""

    model_name_or_path: str = field(metadata={"help": "Hub name or local folder of the pretrained model."})
    activation: Literal["lambda_gelu", "stock", "relu"] = field(
        default="lambda_gelu",
        metadata={
            "help": "What is fine-tuned. lambda_gelu: the hardness is learned and ramped, then ReLU substituted. relu: ReLU "
            "is substituted first. stock: the model's own activation, and ReLU is substituted afterwards, without training."
        },
    )
    compensate: Literal["least_squares", "bias", "none"] = field(
        default="least_squares",
        metadata={
            "help": "With relu and stock: how the substitution is compensated, from training examples without their labels. "
            "none is the naive swap, the baseline of the others."
        },
    )
    calibration_samples: int = field(
        default=300, metadata={"help": "So many training examples are used to compensate the substitution."}
    )
    init_hardness: float = field(default=1.0, metadata={"help": "λ to start from; 1 keeps the pretrained function."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that lies beside the model, and save and publish it too. Only if you trust it."},
    )


@dataclass
class DataArguments:
    """Which data, in the way of transformers' own examples."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name of a dataset, or a local folder of csv, json, parquet or image files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Local csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Local csv, json or parquet file to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Name of the split to evaluate on; by default validation, else test."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the class label, of strings or integers."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many rows, after a shuffle."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})
    metric: str | None = field(
        default=None,
        metadata={
            "help": "A metric of the evaluate library, by Hub name or path of a metric script, in place of accuracy and "
            "macro F1 by scikit-learn. Hub names need a network."
        },
    )


def load_splits(data: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training and evaluation splits, cut to size, with a ClassLabel label column."""
    if data.train_file:
        files = {"train": data.train_file} | ({"validation": data.validation_file} if data.validation_file else {})
        kind = Path(data.train_file).suffix.removeprefix(".").replace("jsonl", "json")
        if kind not in ("csv", "json", "parquet"):
            raise ValueError(f"cannot read {data.train_file!r} by its ending {kind!r}: give a csv, json or parquet file")
        raw = datasets.load_dataset(kind, data_files=files)
    elif data.dataset_name:
        raw = datasets.load_dataset(data.dataset_name, data.dataset_config_name)
    else:
        raise ValueError("no data: give --dataset_name, or --train_file and --validation_file")
    names = [data.validation_split] if data.validation_split else ["validation", "test"]
    validation = next((name for name in names if name in raw), None)
    if data.train_split not in raw or validation is None:
        raise ValueError(
            f"expected a split {data.train_split!r} and one of {names}, found {list(raw)}: "
            "name them with --train_split and --validation_split"
        )
    train, evaluation = raw[data.train_split], raw[validation]
    if data.label_column not in train.column_names:
        raise ValueError(f"no column {data.label_column!r} in {train.column_names}: name it with --label_column")
    if not isinstance(train.features[data.label_column], datasets.ClassLabel):
        values = train.unique(data.label_column)
        new = sorted(set(evaluation.unique(data.label_column)) - set(values), key=str)
        if None in values or new:
            raise ValueError(
                f"the labels in column {data.label_column!r} do not fit: "
                + ("rows without a label in the training data" if None in values else f"{new} only in the evaluation data")
            )
        labels = datasets.ClassLabel(names=[str(value) for value in sorted(values)])

        def encoded(split: datasets.Dataset) -> datasets.Dataset:
            values = [labels.str2int(str(value)) for value in split[data.label_column]]
            return split.remove_columns(data.label_column).add_column(data.label_column, values, feature=labels)

        train, evaluation = encoded(train), encoded(evaluation)
    if data.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(data.max_train_samples, len(train))))
    if data.max_eval_samples is not None:
        evaluation = evaluation.select(range(min(data.max_eval_samples, len(evaluation))))
    return train, evaluation


def classification_metrics(name: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Accuracy and macro F1, or the evaluate metric `name`."""
    if name is not None:
        import evaluate

        metric = evaluate.load(name)
        return lambda p: metric.compute(predictions=np.argmax(p.predictions, axis=-1), references=p.label_ids)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        classes = np.argmax(prediction.predictions, axis=-1)
        return {
            "accuracy": float(accuracy_score(prediction.label_ids, classes)),
            "f1_macro": float(f1_score(prediction.label_ids, classes, average="macro")),
        }

    return compute


def prepare(model: PreTrainedModel, arguments: ModelArguments) -> None:
    """Give the model the activation that the run begins with."""
    if arguments.activation != "stock":
        print(hlg.convert(model, arguments.init_hardness if arguments.activation == "lambda_gelu" else 1.0))


def run(
    trainer_factory: Callable[[type[Trainer]], Trainer],
    model_arguments: ModelArguments,
    data: DataArguments,
    processor: Any,
) -> dict[str, Any]:
    """Train, evaluate, substitute before or after, save and verify; returns and writes the results."""
    start = time.time()
    learning = model_arguments.activation == "lambda_gelu"
    trainer = trainer_factory(hlg.LambdaGELUTrainer if learning else Trainer)
    # The model's loss is a mean over the batch and knows nothing of num_items_in_batch; Trainer believes otherwise and would
    # scale it by the number of processes.
    trainer.model_accepts_loss_kwargs = False
    arguments = trainer.args
    if model_arguments.activation == "relu":
        report = _compensated(trainer, model_arguments)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments.resume_from_checkpoint, arguments))
    trainer.save_model(_internal_call=True)  # as trained, in case the gates turn out too soft; not pushed

    metrics = {"after training": _evaluate(trainer)}
    results: dict[str, Any] = {"activation": model_arguments.activation, "metrics": metrics}
    if learning:
        results["learned_hardness"] = trainer.learned_hardness
        report = _substituted(trainer)
        metrics["after substitution"] = _evaluate(trainer)
    elif model_arguments.activation == "stock":
        hlg.convert(trainer.model)
        with hlg.gates_as_relu(trainer.model):
            metrics["ReLU swapped in, unprepared"] = _evaluate(trainer)
        report = _compensated(trainer, model_arguments)
        metrics["ReLU, not trained further"] = _evaluate(trainer)
    if trainer.is_world_process_zero():
        print(report)
        if report.compensation is not None:
            results["compensation"] = report.compensation.to_dict()
        name = trainer.hub_model_id or f"{Path(model_arguments.model_name_or_path).name}-relu"
        details = _details(trainer, model_arguments, data, metrics)
        learned, trusted = results.get("learned_hardness"), model_arguments.trust_remote_code
        results["stock_difference"] = _publish(trainer, name, details, processor, learned, trusted)
    results |= {
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - start, 1),
        "seed": arguments.seed,
        "versions": {"python": platform.python_version(), **package_versions()},
    }
    if trainer.is_world_process_zero():
        text = json.dumps(results, indent=2) + "\n"
        (Path(arguments.output_dir) / RESULTS_NAME).write_text(text, encoding="utf-8")
    return results


def leave_process_group() -> None:
    """End this process's part in a distributed run, where there is one: once, at the end of a script, the trainer let go of.

    gloo's worker threads let go of their last tensors some time after the result is there. That takes Python's lock (GIL);
    where the interpreter is ending by then, Python ends the thread in the midst of a destructor, and C++ aborts the process
    ("terminate called without an active exception"). The group's own destructor waits for these threads, without the lock.
    It runs when nobody refers to the group any more, and DistributedDataParallel does: hence the garbage first.
    """
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _substituted(trainer: hlg.LambdaGELUTrainer) -> hlg.SubstitutionReport:
    """ReLU in place of the gates that were hardened in training."""
    arguments = trainer.args
    # a best checkpoint chosen by its ReLU metrics may have soft gates, and is good as a ReLU network all the same
    force = arguments.load_best_model_at_end and "relu_" in (arguments.metric_for_best_model or "")
    report = substitute_trained(trainer, trainer.model, force)
    arguments.eval_relu = False  # there is nothing left to switch
    return report


def _details(
    trainer: Trainer, model_arguments: ModelArguments, data: DataArguments, metrics: dict[str, dict[str, float]]
) -> hlg.CardDetails:
    """What the card says of the run; the last of the metrics are those of the ReLU network."""
    names = {"lambda_gelu": "λ-GELU", "relu": "ReLU first", "stock": "the model's own activation"}
    rows = {f"{names[model_arguments.activation]}, {stage}": _headline(values) for stage, values in metrics.items()}
    learning = model_arguments.activation == "lambda_gelu"
    return hlg.CardDetails(
        base_model=None if Path(model_arguments.model_name_or_path).exists() else model_arguments.model_name_or_path,
        dataset=None if data.dataset_name is None or Path(data.dataset_name).exists() else data.dataset_name,
        results=rows,
        final=list(rows)[-1],
        command=command_line(data),
        arguments=stated_arguments(trainer.args, hardness=learning),
    )


def _publish(
    trainer: Trainer,
    name: str,
    details: hlg.CardDetails,
    processor: Any,
    learned: dict[str, float] | None,
    trusted: bool,
) -> float:
    """Save the ReLU network, prove it by stock transformers, push it if that is asked for; how far stock differs."""
    arguments, model, output = trainer.args, trainer.model, Path(trainer.args.output_dir)
    folder = hlg.save_relu_pretrained(
        model,
        output / "relu",
        processor=processor,
        details=details,
        model_name=name,
        learned=learned,
        history=trainer.state.log_history,
        overwrite=True,
        trust_remote_code=trusted,
    )
    difference = hlg.verify_relu_pretrained(model, folder, trust_remote_code=trusted)
    if learned:
        hlg.plot_hardness(learned, output / "hardness.png", trainer.state.log_history)
    print(f"saved in {folder}; stock transformers reproduces it to {difference:g}")
    if arguments.push_to_hub:
        private, revision = arguments.hub_private_repo, arguments.hub_revision
        target = {"private": private, "revision": revision, "trust_remote_code": trusted}
        commit = hlg.push_relu_to_hub(folder, trainer.hub_model_id, processor=(), token=arguments.hub_token, **target)
        print(commit.commit_url)
    return difference


def _compensated(trainer: Trainer, arguments: ModelArguments) -> hlg.SubstitutionReport:
    """Substitute ReLU, compensated on the first training examples; their labels are not used."""
    if arguments.compensate == "none":
        return hlg.relu_ize(trainer.model, force=True)
    examples = trainer.train_dataset.select(range(min(arguments.calibration_samples, len(trainer.train_dataset))))
    # not the Trainer's loader, which deals the examples out to the processes: all of them must refit alike
    batches = DataLoader(examples, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    unlabelled = ({name: value for name, value in batch.items() if name != "labels"} for batch in batches)
    return hlg.relu_ize(trainer.model, calibration=unlabelled, compensate=arguments.compensate)


def command_line(data: DataArguments) -> str:
    """The command that is running, without what decides nothing: a card states the options of the model, the data and the
    hardness, and those of `STATED`; absolute paths are cut to their last part."""
    own = {each.name for kind in (ModelArguments, data) for each in fields(kind)}
    hardness = {each.name for each in fields(hlg.LambdaGELUTrainingArguments)} - {n.name for n in fields(TrainingArguments)}
    return stated_command(f"python -m scripts.{Path(sys.argv[0]).stem}", sys.argv[1:], own | hardness | STATED)


def _evaluate(trainer: Trainer) -> dict[str, float]:
    timing = ("_runtime", "_per_second", "_preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in trainer.evaluate().items()
        if not name.endswith(timing) and name != "epoch"
    }


def _headline(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "loss" and not name.startswith("relu_")}
