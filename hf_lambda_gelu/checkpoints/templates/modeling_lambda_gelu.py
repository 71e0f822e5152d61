"""λ-GELU, f(x; λ) = x · gate(λx), for checkpoints that name it: load with trust_remote_code=True, or import hf_lambda_gelu.

Written by hf_lambda_gelu (Apache-2.0), which trains, hardens and substitutes; method: arXiv 2603.21991.
"""

import math

import torch
from torch import nn
from transformers import @CLASS@
from transformers.activations import ACT2CLS, ACT2FN

_GATES = {
    "lambda_gelu": lambda u: 0.5 * torch.erf(u * math.sqrt(0.5)) + 0.5,
    "lambda_gelu_tanh": lambda u: torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3)),
    "lambda_quick_gelu": lambda u: torch.sigmoid(1.702 * u),
    "lambda_silu": torch.sigmoid,
}


class LambdaGELU(nn.Module):
    """One learned λ per site; below 1 it counts as 1."""

    def __init__(self, key):
        super().__init__()
        self.key = key
        self.unclipped_hardness = nn.Parameter(torch.ones(1))

    def forward(self, x):
        free = self.unclipped_hardness.float()
        hardness = free.detach().clamp(min=1.0) + (free - free.detach())
        z = x.float()
        return (z * _GATES[self.key]((z * hardness).clamp(-1000.0, 1000.0))).to(x.dtype)


class _Maker:
    def __init__(self, key):
        self.key = key

    def __call__(self):
        return LambdaGELU(self.key)


for _key in _GATES:
    for _table in (ACT2FN, ACT2CLS):
        if _key not in _table:
            _table[_key] = _Maker(_key)


class LambdaGELU@CLASS@(@CLASS@):
    pass
