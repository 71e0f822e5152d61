"""Proves a saved ReLU network: stock transformers loads it in a process without this package and computes the same."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .._compat import attention_implementation, pytree
from ..measurement.audit.audit import audit
from ..measurement.examples.choice import example_inputs
from ..measurement.forward import evaluating, in_own_precision, same_random_numbers
from ..structure.loading import checkpoint_errors
from ..structure.offloading import check_not_offloaded
from ..structure.scratch import scratch_folder
from ..structure.smooth_activations import smooth_activations
from ..structure.transaction import transaction
from .card import REPORT_NAME, write_record
from .redaction import is_secret_name


class VerificationError(RuntimeError):
    """The saved folder does not reproduce the model in stock transformers; the message says what differed.

    Examples:
        >>> try:  # doctest: +SKIP
        ...     hlg.verify_relu_pretrained(model, folder)
        ... except hlg.VerificationError as error:
        ...     print(error)
    """


_RELOAD = """
import os, sys
sys.path += [place for place in sys.argv[1].split(os.pathsep) if place and place not in sys.path]
sys.modules["hf_lambda_gelu"] = None  # any import of it fails
import hashlib, json, random, numpy, torch, transformers
from safetensors.torch import load_file, save_file
folder, inputs, outputs, name, attention, threads = sys.argv[2:]
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(threads))
extra = {"attn_implementation": attention} if attention else {}
model, info = getattr(transformers, name).from_pretrained(
    folder, output_loading_info=True, trust_remote_code=False, **extra
)
wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(map(str, info["mismatched_keys"]))
if wrong:
    sys.exit("keys that do not fit: " + ", ".join(wrong[:5]))
for parameter in model.parameters():  # mapped memory is aligned otherwise, which can change the last bit of a product
    parameter.data = parameter.data.clone()
torch.manual_seed(0); random.seed(0); numpy.random.seed(0)  # as `same_random_numbers` does
with torch.no_grad():
    output = model.eval()(**load_file(inputs))
leaves = torch.utils._pytree.tree_leaves(list(output.values()))  # as `_tensors` does
found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
save_file({f"{index:06}": tensor.contiguous().clone() for index, tensor in enumerate(found)}, outputs)
def digest(tensor):
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
print(json.dumps({name: digest(tensor) for name, tensor in model.state_dict().items()}))
"""


class _Stock(NamedTuple):
    """What stock transformers makes of a folder: all that its forward puts out, and a digest of each tensor."""

    outputs: list[Tensor]
    digests: dict[str, str]


@transaction
@torch.no_grad()
def verify_relu_pretrained(
    model: PreTrainedModel, folder: str | os.PathLike[str], inputs: dict[str, Tensor] | None = None
) -> float:
    """Loads `folder` by stock transformers in a new process that cannot import this package, and compares the outputs.

    What was compared is kept in the folder's `lambda_gelu.json`, as "checks".

    Args:
        model: the model in memory that the folder must reproduce, on the CPU (a copy is made of one that is elsewhere).
        folder: what `save_relu_pretrained` wrote.
        inputs: a batch for the model's forward; by default a small one made to fit it.

    Returns:
        max |difference| over all floating point tensors of the output: 0.0 on the same machine.

    Raises:
        VerificationError: it does not load, keys do not fit, or outputs differ by more than 1e-6 of their scale.
        CheckpointError: the folder's lambda_gelu.json is damaged.
        ValueError: weights are offloaded, or no batch can be made for such a model: pass inputs.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1))
        >>> _, report = hlg.convert(model), hlg.relu_ize(model, force=True)
        >>> hlg.verify_relu_pretrained(model, hlg.save_relu_pretrained(model, "runs/proven-relu"))
        0.0
    """
    check_not_offloaded(model)
    record = _record(Path(folder))
    if model.device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    inputs = {k: v.cpu() for k, v in (inputs or example_inputs(model)).items()}
    with evaluating(model), in_own_precision(model), same_random_numbers(model):
        expected = _tensors(model(**inputs))
    stock = _reloaded(model, Path(folder), inputs)
    difference, scale = _compare(expected, stock.outputs, folder)
    # what the batch does not reach, such as most rows of an embedding, is compared too
    other = [name for name, tensor in model.state_dict().items() if stock.digests.get(name) != _digest(tensor)]
    if other:
        raise VerificationError(
            f"{str(folder)!r} computes something else in stock transformers: {len(other)} tensors differ, e.g. {other[0]}"
        )
    outputs = {"largest_difference_of_outputs": difference, "scale_of_outputs": scale}
    if record is not None:
        compared = {**outputs, "identical_tensors": len(stock.digests)}
        write_record(Path(folder), record | {"checks": _checks(model, inputs, compared)})
    return difference


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


def _reloaded(model: PreTrainedModel, folder: Path, inputs: Mapping[str, Tensor]) -> _Stock:
    """Runs the folder's model in another process, as the class and with the attention of `model`, on as many threads.

    The process imports nothing from the current folder, the checkpoint's or PYTHONPATH: -I leaves them off the path, and it
    starts in an empty folder. Its environment holds no secret.
    """
    with scratch_folder() as scratch:
        empty = os.path.join(scratch, "empty")
        os.mkdir(empty)
        source, result = os.path.join(scratch, "inputs.safetensors"), os.path.join(scratch, "outputs.safetensors")
        save_file({k: v.contiguous() for k, v in inputs.items()}, source)
        attention = attention_implementation(model.config)
        arguments = [os.path.abspath(folder), source, result, type(model).__name__, attention, str(torch.get_num_threads())]
        process = _run_apart(_RELOAD, [_homes_of_packages(folder), *arguments], empty, _isolated_environment(empty))
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no message"]
            raise VerificationError(f"stock transformers does not load {str(folder)!r}: {lines[-1]}")
        found = load_file(result)
        return _Stock([found[name] for name in sorted(found)], json.loads(process.stdout.splitlines()[-1]))


def _run_apart(program: str, arguments: list[str], cwd: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def _homes_of_packages(folder: Path) -> str:
    """Where this process has what the other one imports, for installations outside of Python's own folders.

    The current folder and the checkpoint's are never among them.
    """
    homes = dict.fromkeys(
        os.path.dirname(os.path.dirname(os.path.abspath(str(sys.modules[name].__file__))))
        for name in ("torch", "transformers", "safetensors", "numpy", "huggingface_hub")
        if getattr(sys.modules.get(name), "__file__", None)
    )
    barred = {os.path.realpath(os.getcwd()), os.path.realpath(folder)}
    return os.pathsep.join(home for home in homes if os.path.realpath(home) not in barred)


def _isolated_environment(empty: str) -> dict[str, str]:
    """This process's environment without secrets and without what tells Python where to look for modules."""
    kept = {k: v for k, v in os.environ.items() if not is_secret_name(k) and not k.startswith("PYTHON")}
    return kept | {
        "PYTHONSAFEPATH": "1",  # for what the process may start itself
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_TOKEN_PATH": os.path.join(empty, "none"),
        "HF_MODULES_CACHE": os.path.join(empty, "none"),
        "USE_HUB_KERNELS": "NO",
        "TRANSFORMERS_VERBOSITY": "error",
    }


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
        **compared,
        "smooth_activations_left": [item.name for item in smooth_activations(model)],
        "activations_that_ran": audit(model, inputs).counts,
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
