"""Saves a ReLU-ized model as a folder that stock transformers loads, and proves it in a process without this package."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..activation.module import hardness_sites
from ..measurement.audit.audit import audit
from ..measurement.batches import evaluating, example_inputs, main_output
from ..measurement.plots import plot_hardness
from ..structure.config_probe import LAMBDA_KEYS, activation_attributes, governed_modules, has_adapters
from ..structure.smooth_activations import smooth_activations, smooth_modules
from ..surgery.substitution import SubstitutionReport
from .card import CardDetails, card_record, render_card
from .folders import check_new, whole_folder

REPORT_NAME = "lambda_gelu.json"
PLOT_NAME = "hardness_profile.png"


class VerificationError(RuntimeError):
    """The saved folder does not reproduce the model in stock transformers; the message says what differed."""


def save_relu_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processor: Any = None,
    details: CardDetails | None = None,
    model_name: str | None = None,
    learned: dict[str, float] | None = None,
    history: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights (safetensors), a stock config, the processor, a model card and the λ profile; whole or not at all.

    Args:
        model: a model after `relu_ize`.
        folder: the folder to make. An existing one that is not empty is refused unless `overwrite`, which replaces it.
        processor: tokenizer, image processor or feature extractor to save beside the weights; a list for several.
        details: what the card should say, see `CardDetails`.
        model_name: the name in the card, e.g. the Hub id; by default the folder's.
        learned: λ per site as learned, before the ramp (`trainer.learned_hardness`): plotted and kept in `lambda_gelu.json`.
        history: `trainer.state.log_history`, for the plot of λ over training.

    Returns:
        The folder.

    Raises:
        ValueError: smooth gates left in model or config, tensors that are not finite, an existing or unwritable folder.
            Nothing is written.
    """
    folder = Path(os.path.abspath(folder))
    check_relu(model)
    check_new(folder, overwrite)
    details = details or CardDetails()
    report: SubstitutionReport | None = getattr(model, "_relu_report", None)
    smooth = smooth_modules(model)
    if report is None and smooth:
        raise ValueError(f"the model did not come from relu_ize and has smooth modules, from {smooth[0]} on")
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for item in processor if isinstance(processor, (list, tuple)) else [processor]:
            if item is not None:
                item.save_pretrained(temporary)
        write_card(model, temporary, model_name or folder.name, report, details, learned, history)
    return folder


def write_card(
    model: PreTrainedModel,
    folder: Path,
    name: str,
    report: SubstitutionReport | None,
    details: CardDetails,
    learned: dict[str, float] | None = None,
    history: list[dict[str, Any]] | None = None,
) -> None:
    """Write the model card and what it is made from: the λ profile, and its plot where matplotlib is there."""
    profile = learned or (report.profile if report else None)
    plot = PLOT_NAME if profile and _plotted(profile, folder / PLOT_NAME, history or [], bool(learned)) else None
    record = card_record(
        name,
        type(model).__name__,
        details,
        report,
        smooth_activations(model),
        pipeline_tag(model),
        package_versions(),
        learned,
        plot,
    )
    _write_record(folder, record)
    render_card(record).save(folder / "README.md")


def check_relu(model: PreTrainedModel) -> None:
    """Raises ValueError unless the gates of `model` that its config governs are ReLU, and every tensor is finite."""
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters, without which stock transformers would load it: model = "
            "model.merge_and_unload() first"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"expected a transformers model, which a config can rebuild, got {type(model).__name__}: save its weights by "
            "safetensors.torch.save_model"
        )
    left = hardness_sites(model)
    if left:
        raise ValueError(
            f"the model still has {len(left)} λ-GELU modules, from {next(iter(left))} on: call relu_ize(model) first"
        )
    keys = [f"config.{path} = {value!r}" for path, value in activation_attributes(model.config) if value in LAMBDA_KEYS]
    if keys:
        raise ValueError(f"{', '.join(keys)}: stock transformers does not know this key. Call relu_ize(model) first")
    smooth = [f"config.{a.path} = {a.value!r}" for a in governed_modules(model) if a.modules]
    if smooth:
        raise ValueError(f"{', '.join(smooth)}: the model is smooth. Call convert(model), train, and relu_ize(model) first")
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise ValueError(f"{len(broken)} tensors hold NaN or infinity, e.g. {broken[0]}: the training diverged; not saved")


_RELOAD = """
import sys
sys.modules["hf_lambda_gelu"] = None  # any import of it fails
import hashlib, json, torch, transformers
from safetensors.torch import load_file, save_file
folder, inputs, outputs, name, attention, threads = sys.argv[1:]
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(threads))
extra = {"attn_implementation": attention} if attention else {}
model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **extra)
wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(map(str, info["mismatched_keys"]))
if wrong:
    sys.exit("keys that do not fit: " + ", ".join(wrong[:5]))
for parameter in model.parameters():  # mapped memory is aligned otherwise, which can change the last bit of a product
    parameter.data = parameter.data.clone()
with torch.no_grad():
    output = model.eval()(**load_file(inputs))
save_file({k: v.contiguous() for k, v in output.items() if isinstance(v, torch.Tensor)}, outputs)
def digest(tensor):
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
print(json.dumps({name: digest(tensor) for name, tensor in model.state_dict().items()}))
"""


@torch.no_grad()
def verify_relu_pretrained(
    model: PreTrainedModel, folder: str | os.PathLike[str], inputs: dict[str, Tensor] | None = None
) -> float:
    """Load `folder` by stock transformers in a new process that cannot import this package, and compare the outputs.

    What was compared is kept in the folder's `lambda_gelu.json`, as "checks".

    Args:
        model: the model in memory that the folder must reproduce, on the CPU (a copy is made of one that is elsewhere).
        folder: what `save_relu_pretrained` wrote.
        inputs: a batch for the model's forward; by default a small one made to fit it.

    Returns:
        max |difference| over the main output: 0.0 on the same machine.

    Raises:
        VerificationError: it does not load, keys do not fit, or outputs differ by more than 1e-6 of their scale.
    """
    if model.device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    inputs = {k: v.cpu() for k, v in (inputs or example_inputs(model)).items()}
    with evaluating(model):
        expected = main_output(model(**inputs))
    with tempfile.TemporaryDirectory() as scratch:
        source, result = os.path.join(scratch, "inputs.safetensors"), os.path.join(scratch, "outputs.safetensors")
        save_file({k: v.contiguous() for k, v in inputs.items()}, source)
        attention = getattr(model.config, "_attn_implementation", None) or ""
        arguments = [str(folder), source, result, type(model).__name__, attention, str(torch.get_num_threads())]
        process = subprocess.run(
            [sys.executable, "-c", _RELOAD, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no message"]
            raise VerificationError(f"stock transformers does not load {str(folder)!r}: {lines[-1]}")
        digests = json.loads(process.stdout.splitlines()[-1])
        got = main_output(load_file(result))
    difference = float((got.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    if not difference <= 1e-6 * max(scale, 1e-12):
        raise VerificationError(
            f"{str(folder)!r} computes something else in stock transformers: outputs differ by {difference:.3g} at a scale "
            f"of {scale:.3g}. Was the model edited after relu_ize, or cast (which rounds buffers that a reload computes)?"
        )
    # what the batch does not reach, such as most rows of an embedding, is compared too
    other = [name for name, tensor in model.state_dict().items() if digests.get(name) != _digest(tensor)]
    if other:
        raise VerificationError(
            f"{str(folder)!r} computes something else in stock transformers: {len(other)} tensors differ, e.g. {other[0]}"
        )
    path = Path(folder) / REPORT_NAME
    if path.is_file():
        checks = {
            "reloaded_by": f"transformers {version('transformers')}, in a process without hf_lambda_gelu",
            "largest_difference_of_outputs": difference,
            "scale_of_outputs": scale,
            "identical_tensors": len(digests),
            "smooth_activations_left": [item.name for item in smooth_activations(model)],
            "activations_that_ran": audit(model, inputs).counts,
        }
        _write_record(Path(folder), json.loads(path.read_text(encoding="utf-8")) | {"checks": checks})
    return difference


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / REPORT_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def pipeline_tag(model: PreTrainedModel) -> str | None:
    """The Hub's task name for the model's class, as transformers' own pipelines know it."""
    from transformers.modelcard import TASK_MAPPING
    from transformers.pipelines import PIPELINE_REGISTRY  # here, as it imports half of transformers

    name = type(model).__name__
    for task, mapping in TASK_MAPPING.items():
        classes = [c for entry in mapping.values() for c in (entry if isinstance(entry, (list, tuple)) else [entry])]
        if name in classes and task in PIPELINE_REGISTRY.get_supported_tasks():
            return task
    return None


def package_versions() -> dict[str, str]:
    """Versions of what makes the result."""
    return {name: version(name) for name in ("hf_lambda_gelu", "transformers", "torch")}


def _plotted(profile: dict[str, float], path: Path, history: list[dict[str, Any]], learned: bool) -> bool:
    try:
        plot_hardness(profile, path, history, "Learned hardness" if learned else "Hardness before substitution")
    except ImportError:  # matplotlib is an extra
        return False
    return True
