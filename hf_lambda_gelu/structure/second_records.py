"""What torch's transformer layers note of their activation beside the activation itself, kept true.

`nn.TransformerEncoderLayer` notes at construction whether it has ReLU (1), GELU (2) or something else (0), and in eval mode
without gradients runs a fused kernel that computes by this note and never calls the activation. `nn.TransformerEncoder`
notes then whether it may pack padded sequences, which only that kernel takes well. Hooks switch the kernel off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn import functional as F

from .modules import base_of

_RECORD = "activation_relu_or_gelu"
_NESTED = "use_nested_tensor"
_NESTED_BEFORE = "_use_nested_tensor_before"  # what the encoder noted when its layers had what it was built with


def keep_records_true(model: nn.Module, name: str) -> None:
    """Let the records above the module called `name`, which has just been replaced, say what is there now."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf != "activation" or _RECORD not in vars(parent):
        return
    setattr(parent, _RECORD, _record(parent.activation))
    while True:
        encoder = model.get_submodule(parent_name)
        if isinstance(encoder, nn.TransformerEncoder) and _NESTED in vars(encoder):
            before = vars(encoder).setdefault(_NESTED_BEFORE, encoder.use_nested_tensor)
            encoder.use_nested_tensor = before and all(vars(layer).get(_RECORD, 0) for layer in encoder.layers)
        if not parent_name:
            return
        parent_name = parent_name.rpartition(".")[0]


@contextlib.contextmanager
def padding_unpacked(model: nn.Module) -> Iterator[None]:
    """Within the block, torch's encoders pack no sequences: packed ones give zeros where there is padding."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and _NESTED in vars(m)]
    before = [encoder.use_nested_tensor for encoder in encoders]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder, value in zip(encoders, before, strict=True):
            encoder.use_nested_tensor = value


def _record(activation: object) -> int:
    """0, 1 or 2 as torch has it; a tanh GELU is 0, since the kernel computes the one with erf."""
    if activation is F.relu or type(activation) is nn.ReLU:
        return 1
    if activation is F.gelu or (isinstance(activation, nn.Module) and base_of(activation) == "gelu"):
        return 2
    return 0
