"""A process with stock transformers and without this package: what it makes of a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .._compat import attention_implementations
from ..structure.scratch import scratch_folder
from .carried_code import auto_of
from .redaction import is_secret_name


class VerificationError(RuntimeError):
    """The saved folder does not reproduce the model in stock transformers; the message says what differed.

    Examples:
        >>> try:  # doctest: +SKIP
        ...     hlg.verify_relu_pretrained(model, folder)
        ... except hlg.VerificationError as error:
        ...     print(error)
    """


# The garbage collector leaves out what is imported, and the end of a process that succeeded is not waited for: of both the
# process would be busy as long as of all else, with a small model.
_RELOAD = """
import atexit, gc
gc.disable()
import os, sys
sys.path += [place for place in sys.argv[1].split(os.pathsep) if place and place not in sys.path]
sys.modules["hf_lambda_gelu"] = None  # any import of it fails
import hashlib, json, random, numpy, torch, transformers
from safetensors.torch import load_file, save_file
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)
folder, inputs, outputs, name, wanted, threads, trusted = sys.argv[2:]
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(threads))
def load(**extra):
    trust = trusted == "trusted"
    return getattr(transformers, name).from_pretrained(folder, output_loading_info=True, trust_remote_code=trust, **extra)
def attention(model):  # as `attention_implementations` finds it
    found = {n: getattr(getattr(m, "config", None), "_attn_implementation", None) for n, m in model.named_modules()}
    return {name: value for name, value in found.items() if isinstance(value, str)}
model, info = load()
wanted = json.loads(wanted)
if attention(model) != wanted:
    model, info = load(attn_implementation=wanted[""]) if "" in wanted else (model, info)
    for part, module in model.named_modules():  # parts that have another one than the whole
        if part in wanted:
            module.config._attn_implementation = wanted[part]
wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(map(str, info["mismatched_keys"]))
if wrong:
    sys.exit("keys that do not fit: " + ", ".join(wrong[:5]))
for tensor in [*model.parameters(), *model.buffers()]:  # as `_with_memory_of_its_own` does
    tensor.data = tensor.data.clone()
torch.manual_seed(0); random.seed(0); numpy.random.seed(0)  # as `same_random_numbers` does
with torch.no_grad():
    output = model.eval()(**load_file(inputs))
leaves = torch.utils._pytree.tree_leaves(list(output.values()))  # as `_tensors` does
found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
save_file({f"{index:06}": tensor.contiguous().clone() for index, tensor in enumerate(found)}, outputs)
def digest(tensor):
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
print(json.dumps({name: digest(tensor) for name, tensor in model.state_dict().items()}), flush=True)
os._exit(0)
"""


class Stock(NamedTuple):
    """What stock transformers makes of a folder: all that its forward puts out, and a digest of each tensor."""

    outputs: list[Tensor]
    digests: dict[str, str]


def reloaded(model: PreTrainedModel, folder: Path, inputs: Mapping[str, Tensor], trust_remote_code: bool = False) -> Stock:
    """Runs the folder's model in another process, as the class and with the attention of `model`, on as many threads.

    The process imports nothing from the current folder, the checkpoint's or PYTHONPATH: -I leaves them off the path, and it
    starts in an empty folder. Its environment holds no secret. With trust the code that the folder's config names runs: that
    of the folder, as the process has a cache of modules of its own, which is empty.
    """
    name = type(model).__name__
    auto = auto_of(folder, name) if trust_remote_code else None
    if auto is None and not hasattr(transformers, name):
        raise VerificationError(
            f"stock transformers has no class {name!r}, and {str(folder)!r} holds no code that makes it: keep the class in "
            f"a Python file of its own, call {name}.register_for_auto_class('AutoModel'), and the same without argument of "
            "its config class, and save the model again with trust_remote_code=True"
        )
    with scratch_folder() as scratch:
        empty = os.path.join(scratch, "empty")
        os.mkdir(empty)
        source, result = os.path.join(scratch, "inputs.safetensors"), os.path.join(scratch, "outputs.safetensors")
        save_file({k: v.contiguous() for k, v in inputs.items()}, source)
        attention, threads = json.dumps(attention_implementations(model)), str(torch.get_num_threads())
        trusted = "trusted" if trust_remote_code else "not trusted"
        arguments = [os.path.abspath(folder), source, result, auto or name, attention, threads, trusted]
        process = run_apart(_RELOAD, [_homes_of_packages(folder), *arguments], empty, _isolated_environment(empty))
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no message"]
            raise VerificationError(f"stock transformers does not load {str(folder)!r}: {lines[-1]}")
        found = load_file(result)
        return Stock([found[name] for name in sorted(found)], json.loads(process.stdout.splitlines()[-1]))


def run_apart(program: str, arguments: list[str], cwd: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
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
        "HF_MODULES_CACHE": os.path.join(empty, "modules"),
        "USE_HUB_KERNELS": "NO",
        "TRANSFORMERS_VERBOSITY": "error",
    }
