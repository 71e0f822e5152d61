"""Makes the λ-GELU keys known to transformers' activation tables."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers.activations import ACT2CLS, ACT2FN

from . import older_checkpoints
from .bases import BASES
from .module import LambdaGELU


def register() -> None:
    """Adds `lambda_gelu`, `lambda_gelu_tanh`, `lambda_quick_gelu` and `lambda_silu` to `ACT2FN` and `ACT2CLS`.

    Both tables, as some models (RT-DETR v2, D-FINE, TextNet …) read the second. Checkpoints of release 0.1 are converted as
    they are loaded. `import hf_lambda_gelu` calls it; a second call changes nothing.

    Raises:
        RuntimeError: another package holds one of the keys.

    Examples:
        >>> from transformers.activations import ACT2FN
        >>> import hf_lambda_gelu as hlg
        >>> hlg.register()
        >>> ACT2FN["lambda_silu"]
        LambdaGELU(hardness=1, base='silu')
    """
    for table in (ACT2FN, ACT2CLS):
        for base in BASES.values():
            if base.key not in table:
                table[base.key] = partial(LambdaGELU, base=base.name)  # callable as it is, unlike a (class, kwargs) pair
            elif not _is_ours(dict.__getitem__(table, base.key)):
                raise RuntimeError(
                    f"transformers' activation table already holds {base.key!r} = {dict.__getitem__(table, base.key)!r}, "
                    "which is not from hf_lambda_gelu: remove that entry, or the package that made it, before the import"
                )

    older_checkpoints.register()


def _is_ours(entry: Any) -> bool:
    # by name, so that a reloaded module recognises the entry of the first import
    made = getattr(entry, "func", None)
    return (getattr(made, "__module__", ""), getattr(made, "__qualname__", "")) == (
        LambdaGELU.__module__,
        LambdaGELU.__qualname__,
    )
