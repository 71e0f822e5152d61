"""Saves and runs models in stock transformers, in a process that cannot import this package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from scripts.tools.warm_stock import run_in_stock

_STOCK = """
import json, sys
sys.modules["hf_lambda_gelu"] = None
import torch, transformers
from support import tiny
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
try:
    import hf_lambda_gelu
except ImportError:
    pass
else:
    sys.exit("the package can be imported")
for folder, name in json.loads(sys.argv[1]):
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    for parameter in model.parameters():  # where the mapped file puts a vector can change the last bit of a product with it
        parameter.data = parameter.data.clone()
    outputs = tiny.outputs(model.eval(), load_file(folder + ".inputs"))
    save_file({f"{i:03}": tensor.contiguous() for i, tensor in enumerate(outputs)}, folder + ".outputs")
"""


def stock_outputs(models: dict[str, tuple[str, dict[str, Tensor]]], root: Path) -> dict[str, list[Tensor]]:
    """{folder in `root`: (class name, batch)} → all outputs; one process for all of them."""
    for name, (_, batch) in models.items():
        save_file({key: tensor.contiguous() for key, tensor in batch.items()}, root / f"{name}.inputs")
    work = json.dumps([(str(root / name), cls) for name, (cls, _) in models.items()])
    process = run_in_stock(_STOCK, [work], str(root), os.environ, [str(Path(__file__).parents[1])])
    assert process.returncode == 0, process.stderr[-3000:]
    return {name: list(load_file(root / f"{name}.outputs").values()) for name in models}


class Saved(NamedTuple):
    """A ReLU model, where it was saved, a batch, and what stock transformers makes of folder and batch."""

    model: PreTrainedModel
    folder: Path
    batch: dict[str, Tensor]
    stock: list[Tensor]


def reload_in_stock(models: dict[str, tuple[PreTrainedModel, dict[str, Tensor]]], root: Path) -> dict[str, Saved]:
    """Save all, then load and run all in one stock process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # drawing took longer than all else
        for name, (model, _) in models.items():
            hlg.save_relu_pretrained(model, root / name)
    stock = stock_outputs({name: (type(model).__name__, batch) for name, (model, batch) in models.items()}, root)
    return {name: Saved(model, root / name, batch, stock[name]) for name, (model, batch) in models.items()}
