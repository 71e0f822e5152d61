"""All that a verb must leave as it was where it fails: of a model, of the process and of the folder for temporary files.

Written without the package's own snapshot, which it is there to judge.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _device
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2CLS, ACT2FN
from transformers.utils import logging

from hf_lambda_gelu._compat import compile_stance


def fingerprint(model: nn.Module, folder: Path) -> dict[str, Any]:
    """{what: its state, to be compared by ==}; `folder` is where temporary files are made."""
    return {**_tensors(model), **_modules(model), **_process(), "temporary files": sorted(_files(folder))}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _tensors(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        data = _digest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else ""
        found[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), data)
        found[f"gradient of {name}"] = (tensor.requires_grad, tensor.is_leaf, id(tensor.grad))
    found["names in state_dict"] = list(model.state_dict())
    return found


def _modules(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"module {name}"] = (id(module), type(module).__name__, module.training)
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                found[f"config {name}.{key}"] = (id(value), repr(_plain(value)))
            elif isinstance(value, dict):
                found[f"attribute {name}.{key}"] = (id(value), [(k, id(v)) for k, v in value.items()])
            else:
                found[f"attribute {name}.{key}"] = value if isinstance(value, (bool, int, float, str)) else id(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, PreTrainedConfig):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _process() -> dict[str, Any]:
    mask = os.umask(0)
    os.umask(mask)
    patched = [(name, key) for name in initialization.TORCH_MODULES_TO_PATCH for key in initialization.TORCH_INIT_FUNCTIONS]
    return {
        "umask": mask,
        "torch's random numbers": _digest(torch.get_rng_state().numpy().tobytes()),
        "NumPy's random numbers": _digest(repr(np.random.get_state()).encode() + np.random.get_state()[1].tobytes()),
        "Python's random numbers": _digest(repr(random.getstate()).encode()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "stance of torch.compile": getattr(compile_stance(), "stance", "default"),
        "default dtype": torch.get_default_dtype(),
        "function modes": [id(mode) for mode in _get_current_function_mode_stack()],
        "dispatch modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "device of a block": _device.CURRENT_DEVICE,
        "ACT2FN": [(key, id(dict.__getitem__(ACT2FN, key))) for key in ACT2FN],
        "ACT2CLS": [(key, id(value)) for key, value in ACT2CLS.items()],
        "verbosity": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "torch.nn.init": [id(getattr(sys.modules.get(name), key, None)) for name, key in patched],
        "PreTrainedModel": (PreTrainedModel.tie_weights, PreTrainedModel._init_weights, torch.linspace),
    }


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Each path, and of a file what is in it."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)), _digest(path.read_bytes()) if path.is_file() else ""
