"""Which linear maps of a ReLU network may skip the weights of units that are 0, and why others may not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..measurement.difference import difference, float_outputs, tolerance
from ..structure.feed_forward import Blocks, FeedForward
from ..structure.hooks import Hooks
from ..structure.linear_maps import LinearMap
from . import sparse_products
from .sparse_modules import SparseConv1D, SparseDown, SparseUp


@dataclass(frozen=True)
class Candidate:
    """A module that may become sparse.

    Attributes:
        cls: what its class is to be.
        site: the block's ReLU where it must be noted what fires; None where the input says it.
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    shape: tuple[int, int]
    site: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """That of the module."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def candidates(model: nn.Module, sites: Mapping[str, nn.Module], blocks: Blocks, dense: dict[str, str]) -> list[Candidate]:
    """The maps of the blocks that may become sparse; why others may not goes into `dense`, by name."""
    found = []
    for block in blocks.found.values():
        for made in filter(None, (block.up, block.after)):
            name = made.name.rpartition(".")[0]
            module, site = model.get_submodule(name), sites[block.site]
            reason = _reason(made, module) or (_reason_of_up(module, site, block) if made is block.up else "")
            if reason:
                dense[name] = reason
            elif made is block.up:
                found.append(Candidate(name, module, SparseUp, made.shape, site))
            else:
                cls = SparseDown if type(module) is nn.Linear else SparseConv1D
                found.append(Candidate(name, module, cls, made.shape))
    return found


def _reason_of_up(module: nn.Module, site: nn.Module, block: FeedForward) -> str:
    if type(module) is not nn.Linear or type(site) is not nn.ReLU:
        return f"it is a {type(module).__name__}, and its ReLU a {type(site).__name__}"
    return "" if block.up_last else "it runs before the ReLU, which says what fires"


def used_once(candidates: list[Candidate], run: Callable[[], Any], dense: dict[str, str]) -> list[Candidate]:
    """Without the maps W₃ whose outputs something besides the block uses: without some of them the outputs would change."""
    ups = [candidate for candidate in candidates if candidate.site is not None]
    expected = [output.clone() for output in float_outputs(run())] if ups else []
    used = (
        [] if not ups or _same_without(ups, run, expected) else [up for up in ups if not _same_without([up], run, expected)]
    )
    dense.update({up.name: "something else uses what it puts out" for up in used})
    return [candidate for candidate in candidates if candidate not in used]


def _same_without(ups: list[Candidate], run: Callable[[], Any], expected: list[Tensor]) -> bool:
    """Whether the outputs stay if the maps put out 0 wherever their gates do."""
    gates: dict[nn.Module, Tensor] = {}

    def note(site: nn.Module, args: Any, output: Tensor) -> None:
        gates[site] = output != 0

    def cut(site: nn.Module, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * gates[site]

    with Hooks() as hooks:
        for up in ups:
            if up.site is not None:
                hooks.after(up.site, note)
                hooks.after(up.module, partial(cut, up.site))
        return difference(expected, float_outputs(run())) <= tolerance(expected)


def _reason(made: LinearMap, module: nn.Module) -> str:
    if made.parameter.dtype not in sparse_products.DTYPES:
        return f"its weight is {made.parameter.dtype}: the kernel takes torch.float32 and torch.bfloat16"
    if type(module) not in (nn.Linear, Conv1D) or made.parameter is not module.weight:
        return f"it is a {type(module).__name__}"
    return ""
