"""Proves a saved ReLU network: stock transformers loads it in a process without this package and computes the same."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._compat import pytree
from ..measurement.audit.audit import audit
from ..measurement.examples.choice import example_inputs
from ..measurement.forward import evaluating, in_own_precision, same_random_numbers
from ..structure.loading import check_trusted, checkpoint_errors
from ..structure.offloading import check_not_offloaded
from ..structure.smooth_activations import smooth_activations
from ..structure.transaction import transaction
from .card import REPORT_NAME, write_record
from .manifest import Manifest, changed_files, manifest
from .processors import saved_processor
from .stock_process import VerificationError, reloaded


def verify_relu_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    inputs: dict[str, Tensor] | None = None,
    *,
    trust_remote_code: bool = False,
) -> float:
    """Loads `folder` by stock transformers in a new process that cannot import this package, and compares the outputs.

    What was compared is kept in the folder's `lambda_gelu.json`, as "checks", with name, size and SHA-256 of each file that
    a push uploads: a push takes these bytes, and `hf-lambda-gelu verify you/model` finds them again.

    Args:
        model: the model in memory that the folder must reproduce, on the CPU (a copy is made of one that is elsewhere).
        folder: what `save_relu_pretrained` wrote.
        inputs: a batch for the model's forward; by default a small one, made by the folder's tokenizer or processor, or else
            to fit the model's architecture.
        trust_remote_code: run code of its own that the folder has, in the other process: that of the folder, of which each
            file is among those of the proof. Without it such a folder is refused.

    Returns:
        max |difference| over all floating point tensors of the output: 0.0 on the same machine.

    Raises:
        VerificationError: it does not load, keys do not fit, or outputs differ by more than 1e-6 of their scale.
        CheckpointError: the folder's lambda_gelu.json is damaged, or it has code that is not trusted.
        ValueError: weights are offloaded, inputs that are no tensors, or no batch can be made for such a model: pass inputs.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1))
        >>> _, report = hlg.convert(model), hlg.relu_ize(model, force=True)
        >>> hlg.verify_relu_pretrained(model, hlg.save_relu_pretrained(model, "runs/proven-relu"))
        0.0
    """
    return prove(model, Path(folder), inputs, trust_remote_code).difference


class Proof(NamedTuple):
    """What was found of a folder: max |difference| over all outputs, and the files that it is true of."""

    difference: float
    files: Manifest


@transaction
@torch.no_grad()
def prove(
    model: PreTrainedModel, folder: Path, inputs: Mapping[str, Tensor] | None = None, trust_remote_code: bool = False
) -> Proof:
    """As `verify_relu_pretrained`.

    Raises:
        VerificationError: also where a file changes meanwhile.
    """
    check_not_offloaded(model)
    check_inputs(inputs)
    if not folder.is_dir():
        raise VerificationError(f"there is no folder {str(folder)!r}: save_relu_pretrained makes one")
    check_trusted(folder, trust_remote_code)
    record, files, state = _record(folder), manifest(folder, trust_remote_code), _states(folder)
    if model.device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    inputs = inputs or example_inputs(model, saved_processor(folder, trust_remote_code))
    inputs = {k: v.cpu() for k, v in inputs.items()}
    expected, stock = _outputs(model, inputs), reloaded(model, folder, inputs, trust_remote_code)
    # what the batch does not reach, such as most rows of an embedding, is compared too
    other = [name for name, tensor in model.state_dict().items() if stock.digests.get(name) != _digest(tensor)]
    try:
        difference, scale = _compare(expected, stock.outputs, folder)
    except VerificationError:
        if other:
            raise
        difference, scale = _compare(_outputs(_with_memory_of_its_own(model), inputs), stock.outputs, folder)
    if other:
        raise VerificationError(
            f"{str(folder)!r} computes something else in stock transformers: {len(other)} tensors differ, e.g. {other[0]}"
        )
    if _states(folder) != state:
        raise VerificationError(f"files of {str(folder)!r} were changed while they were proven: verify it once more")
    if record is not None:
        compared = {"largest_difference_of_outputs": difference, "scale_of_outputs": scale}
        checks = _checks(model, inputs, {**compared, "identical_tensors": len(stock.digests)})
        checks["code_that_was_trusted"] = [name for name in files if name.endswith(".py")]
        write_record(folder, record | {"checks": {**checks, "files": files}})
    return Proof(difference, files)


def check_inputs(inputs: object) -> None:
    """Raises ValueError unless they are None, or a mapping of tensors."""
    if inputs is None:
        return
    given = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"inputs{[name] if name else ''}: got a {type(value).__name__}, expected a batch of tensors, {{name: "
                "tensor}, as tokenizers and processors make it with return_tensors='pt'"
            )


def check_as_proven(folder: Path) -> bool:
    """Whether the folder's record says which files were proven; they are those of the folder then.

    Raises:
        VerificationError: they are not.
        CheckpointError: the record is damaged.
    """
    record = _record(folder)
    checks = (record or {}).get("checks")
    proven = checks.get("files") if isinstance(checks, dict) else None
    if not isinstance(proven, dict):
        return False
    changed = changed_files(proven, manifest(folder, trust_remote_code=True))  # code is only read here
    if changed:
        raise VerificationError(
            f"{str(folder)!r} is not what its {REPORT_NAME} says was proven: {changed[0]}, {len(changed)} such files. "
            "Fetch it again; if you changed it yourself, save_relu_pretrained writes a new one"
        )
    return True


def _states(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file())


def _with_memory_of_its_own(model: PreTrainedModel) -> PreTrainedModel:
    """A copy, of which no tensor lies in a mapped file: where that puts one can change the last bit of a product, of which a
    deep network, or one that chooses the largest, may make more."""
    model = copy.deepcopy(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def _outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with evaluating(model), in_own_precision(model), same_random_numbers(model):
        return _tensors(model(**{name: value.clone() for name, value in inputs.items()}))  # it may write into them


def _tensors(output: Mapping[str, Any]) -> list[Tensor]:
    """All floating point tensors that a forward puts out, in its order."""
    leaves = pytree.tree_leaves(list(output.values()))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _compare(expected: list[Tensor], got: list[Tensor], folder: str | os.PathLike[str]) -> tuple[float, float]:
    """The largest difference, and the scale of the first output; VerificationError where the outputs are not the same."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, got)]
    if not expected or shapes[0] != shapes[1]:
        raise VerificationError(
            f"{str(folder)!r} puts out tensors of shapes {shapes[1]} in stock transformers, the model {shapes[0]}. "
            "Is the model of another configuration than the folder?"
        )
    largest = 0.0
    for one, other in zip(expected, got, strict=True):
        apart = torch.where(one == other, 0.0, (other.double() - one.double()).abs())  # where both are −∞ too
        difference, scale = float(apart.max()) if apart.numel() else 0.0, _scale(one)
        if not difference <= 1e-6 * max(scale, 1e-12):
            raise VerificationError(
                f"{str(folder)!r} computes something else in stock transformers: outputs differ by {difference:.3g} at a "
                f"scale of {scale:.3g}. Was the model edited after relu_ize, or cast (which rounds buffers that a reload "
                "computes)?"
            )
        largest = max(largest, difference)
    return largest, _scale(expected[0])


def _scale(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    finite = tensor[tensor.isfinite()].double().abs()
    return float(finite.max()) if finite.numel() else 0.0


def _record(folder: Path) -> dict[str, Any] | None:
    """The folder's record; None where it has none, as what a link points to is not the folder's."""
    path = folder / REPORT_NAME
    if path.is_symlink() or not path.is_file():
        return None
    with checkpoint_errors(f"{str(path)!r} is damaged, expected what save_relu_pretrained wrote"):
        record: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8"))}
    return record


def _checks(model: PreTrainedModel, inputs: dict[str, Tensor], compared: dict[str, float]) -> dict[str, Any]:
    """What was compared, and which activations ran."""
    return {
        "reloaded_by": f"transformers {version('transformers')}, in a process without hf_lambda_gelu",
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        **compared,
        "smooth_activations_left": [item.name for item in smooth_activations(model)],
        "activations_that_ran": audit(model, inputs).counts,
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
