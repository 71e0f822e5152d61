"""Small networks around one function, to be audited."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_lambda_gelu.measurement.audit.audit import AuditReport


def kinds(report: AuditReport) -> dict[str, str]:
    """{name: kind} of what ran."""
    return {entry.name: entry.kind for entry in report.entries}


class Apply(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def network(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear maps with the function between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), Apply(function), nn.Linear(64, 4)).to(dtype)


def x_of(dtype: torch.dtype = torch.float32, rows: int = 16) -> Tensor:
    """Rows for it."""
    return (torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)) * 3.0).to(dtype)
