"""Training without dropout: a student with it would learn to be another function than its teacher, which has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_TORCH = "torch.nn.modules.dropout"


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block no module of `model` drops anything; afterwards each does as before. The config stays as it is.

    Probabilities are known by their names (`attention_dropout`, `drop_prob`, `layerdrop`), and `p` of torch's own modules.
    The few models that read them from the config while they run (Falcon, GPT-J, GPT-Neo, Persimmon) go on dropping there.
    """
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and type(module).__module__ == _TORCH))
    ]
    try:
        for module, name, _ in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
