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
    """One learned λ ≥ 1 per site, held as λ − 1."""

    def __init__(self, key):
        super().__init__()
        self.key = key
        self.hardness_excess = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        excess = self.hardness_excess.float()
        hardness = 1.0 + excess + (excess.clamp(min=0.0) - excess).detach()
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
