"""Training without dropout or augmentation: with them a student would learn to be another function than its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_TORCH = "torch.nn.modules.dropout"
_WITH_MODES = (_BatchNorm, nn.RNNBase)  # which learn in train mode alone


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block no module of `model` drops anything; afterwards each does as before. The config stays as it is.

    Nor does one augment its inputs (SpecAugment, DINOv3's positions, a router's jitter): modules stay in eval mode whatever
    mode the model is put into. In train mode are the model itself, batch norms, and what checkpoints its gradients. There
    probabilities are known by their names (`attention_dropout`, `drop_prob`, `layerdrop`), and `p` of torch's own modules.
    Where gradients are checkpointed, the few models that read them from the config there (Falcon, BLT, ProphetNet) go on.
    """
    asked = {  # module that stays in eval mode → the mode that it was put into
        module: module.training for module in model.modules() if module is not model and not isinstance(module, _WITH_MODES)
    }
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and type(module).__module__ == _TORCH))
    ]
    try:
        for module in asked:
            vars(module)["train"] = partial(_stay_in_eval, module, asked)
        for module, name, _ in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, mode in asked.items():
            vars(module).pop("train", None)
            module.training = mode
        for module, name, value in found:
            setattr(module, name, value)


def _stay_in_eval(module: nn.Module, asked: dict[nn.Module, bool], mode: bool = True) -> nn.Module:
    """In the place of `train`: the modules inside get the mode, as far as they take it."""
    asked[module] = mode
    for child in module.children():
        child.train(mode)
    module.training = mode and getattr(module, "gradient_checkpointing", False)  # which is of train mode alone
    return module
