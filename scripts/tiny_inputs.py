"""Inputs for tiny models, by the signature of forward."""
from __future__ import annotations
import inspect
from typing import Any
import torch
from torch import Tensor
from transformers import PreTrainedModel
def example_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    return {}
