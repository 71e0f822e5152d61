"""Whether a model can be worked on as it stands: what every verb that edits one asks first."""

from __future__ import annotations

import torch
from torch import nn

from .adapters import adapted_layer, how_to_merge


def check_usable(model: nn.Module, error: type[ValueError] = ValueError) -> None:
    """Raises `error` where a model cannot be edited or refit, before anything is changed.

    In torch.inference_mode autograd keeps no graph, by which linear maps are found, and every tensor that is made is one
    that can never be trained; tensors made there cannot be changed in place outside of it. torch.no_grad is another matter.
    """
    if torch.is_inference_mode_enabled():
        raise error(
            "called within torch.inference_mode(), where autograd shows nothing and new parameters can never be trained: "
            "call it outside, or within torch.no_grad()"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise error(
                f"{name} was made within torch.inference_mode(), so it can be neither trained nor changed in place: load or "
                f"build the model outside of it, or replace its tensors by clones made outside"
            )


def check_base_alone(model: nn.Module, what: str, error: type[ValueError] = ValueError) -> None:
    """Raises `error` where adapters stand in the layers whose weights are to be changed.

    The base is shared by all adapters, and is what is left when they are off. Weights that suit those in effect are wrong
    for the others and for none, and adapters' files do not hold them.
    """
    layer = adapted_layer(model)
    if layer is not None:
        raise error(
            f"the model has adapters in its layers ({layer}), and {what} changes base weights, which adapters' "
            f"files do not hold, and which are wrong for other adapters or none: {how_to_merge(model)}"
        )
