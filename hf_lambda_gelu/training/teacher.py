"""The teacher of a distillation: where it comes from, and whether it fits the student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..activation.module import hardness_sites
from ..checkpoints.save import pipeline_tag
from ..structure.loading import CheckpointError, load_saved
from ..structure.offloading import check_not_offloaded

_SMALL = ["*.json", "*.model", "*.py"]  # what a model needs beside its weights
_ADVICE = "Let the teacher be the smooth model that the student was made from"


def found_teacher(
    teacher: PreTrainedModel | str | os.PathLike[str] | None, student: nn.Module, trust_remote_code: bool
) -> PreTrainedModel:
    """The teacher, loaded if it is a folder or a Hub name, in eval mode; it fits the student.

    Raises:
        ValueError: it does not fit; CheckpointError: there is no such one.
    """
    if isinstance(teacher, (str, os.PathLike)):
        teacher = load_saved(_folder(teacher), trust_remote_code=trust_remote_code)
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"expected a model of transformers as teacher, its folder or Hub name, got {type(teacher).__name__}. {_ADVICE}"
        )
    check_fits(student, teacher)
    teacher.eval()
    return teacher


def _folder(name: str | os.PathLike[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*_SMALL, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*_SMALL, "*.bin"]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise CheckpointError(f"the teacher {str(name)!r} is neither a folder nor a model on the Hub: {error}") from error
    return folder


def student_model(student: nn.Module) -> PreTrainedModel:
    """The model of transformers that the student is, or that PEFT has put adapters into.

    Raises:
        ValueError: it is none, still has λ-GELU, or is offloaded.
    """
    if not isinstance(student, nn.Module):
        raise ValueError(f"expected the student, a model, got {type(student).__name__}: a name or model_init is not taken")
    wrapped: Any = student
    base = wrapped.get_base_model() if hasattr(student, "get_base_model") else student
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"expected the student to be a model of transformers, got {type(student).__name__}")
    sites = hardness_sites(student)
    if sites:
        raise ValueError(
            f"the student still has {len(sites)} λ-GELU modules, from {next(iter(sites))} on: call relu_ize(model) first. "
            "LambdaGELUTrainer is what learns λ"
        )
    check_not_offloaded(student)
    return base


def check_fits(student: nn.Module, teacher: PreTrainedModel) -> None:
    """Raises ValueError unless the teacher takes what the student takes and predicts what it predicts.

    What no config says is seen at the first batch, before a weight changes: outputs of other shapes.
    """
    base = student_model(student)
    ours = {id(parameter) for parameter in base.parameters()}
    shared = next((name for name, parameter in teacher.named_parameters() if id(parameter) in ours), None)
    if teacher is base or shared is not None:
        raise ValueError(
            f"the teacher is the student itself, or shares weights with it ({shared}), so that it would learn from what it "
            "has become: load it apart, or take copy.deepcopy(model) before relu_ize and before PEFT"
        )
    said = [_said(model) for model in (base, teacher)]
    for what, mine, its in ((key, said[0][key], said[1][key]) for key in said[0]):
        if mine is not None and its is not None and mine != its:
            raise ValueError(
                f"the teacher ({type(teacher).__name__}) does not fit the student ({type(base).__name__}): its {what} is "
                f"{_short(its)}, the student's is {_short(mine)}. {_ADVICE}"
            )


def _said(model: PreTrainedModel) -> dict[str, Any]:
    """What two models must have in common, by name; None where a model does not say."""
    config = model.config
    task, text = pipeline_tag(model), config.get_text_config()
    labelled = task is not None and task.endswith("classification")
    names = getattr(config, "id2label", None) if labelled else None
    own_names = names is not None and any(name != f"LABEL_{index}" for index, name in names.items())
    return {
        "task": task,
        "input": model.main_input_name,
        "vocabulary size": getattr(text, "vocab_size", None),
        "number of labels": getattr(config, "num_labels", None) if labelled else None,
        "list of labels": names if own_names else None,
        "problem_type": getattr(config, "problem_type", None) if labelled else None,
        "hidden size": getattr(text, "hidden_size", None) if task == "feature-extraction" else None,
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
