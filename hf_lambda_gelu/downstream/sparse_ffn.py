"""`sparsify_ffn`: decoding one token at a time, feed-forward blocks read only the weights of units that fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..measurement.difference import difference, float_outputs, tolerance
from ..measurement.examples.choice import example_inputs
from ..measurement.forward import measuring
from ..reports import table, to_dict
from ..structure.hooks import Hooks
from ..structure.linear_maps import LinearMap
from ..structure.transaction import transaction
from ..structure.usable import check_usable
from ..surgery.folding import forward
from . import sparse_products
from .crossover import FIRING, ROUNDS, Crossover, crossover, firing
from .feed_forward import Blocks, FeedForward, feed_forwards
from .relu_sites import relu_sites
from .sparse_modules import SPARSE, Fired, SparseConv1D, SparseDown, SparseReLU, SparseUp


@dataclass(frozen=True)
class SparseMap:
    """One linear map that reads the weights of firing units alone.

    Attributes:
        name: of its module.
        shape: (d, k), the widths of its input and output.
        dense, sparse: microseconds for one row: torch's product; the kernel with a tenth of the units firing.
        pays_from: the share of zeros from which the kernel is the faster one, by measurement; below it runs torch's product.
    """

    name: str
    shape: tuple[int, int]
    dense: float
    sparse: float
    pays_from: float


@dataclass
class SparseFFNReport:
    """What `sparsify_ffn` did, and how to undo it: `undo()`, or the end of a `with` block.

    Attributes:
        maps: the linear maps that are sparse now, in network order.
        dense: site or map → why its block, or it alone, stays dense.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> with hlg.sparsify_ffn(model, torch.randn(2, 64)) as report, torch.no_grad():
        ...     out = model(torch.randn(1, 64))
        >>> type(model[2]) is torch.nn.Linear
        True
    """

    maps: list[SparseMap] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    _patched: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False, compare=False)

    def undo(self) -> None:
        """Give the modules back the classes that they had, and the weights their layout; a second time does nothing."""
        while self._patched:
            module, before = self._patched[-1]
            _set_class(module, before)
            self._patched.pop()

    def __enter__(self) -> SparseFFNReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def to_dict(self) -> dict[str, Any]:
        """The maps, and what stays dense."""
        return to_dict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.maps)} linear maps read the weights of firing units alone, one row at a time"]
        rows = [
            [m.name, f"{m.shape[0]} → {m.shape[1]}", f"{m.dense:.0f}", f"{m.sparse:.0f}", f"{m.pays_from:.0%}"]
            for m in self.maps
        ]
        if rows:
            header = ["map", "widths", "dense, µs", "at 90% zeros, µs", "pays from, zeros"]
            lines += table(header, [">14", ">9", ">16", ">16"], rows)
        lines += [f"  {name} stays dense: {reason}" for name, reason in self.dense.items()]
        return "\n".join(lines)


@transaction
@torch.no_grad()
def sparsify_ffn(model: nn.Module, inputs: Any = None) -> SparseFFNReport:
    """Let feed-forward blocks skip the weights of units that are 0, one token at a time on a CPU. [derived]

    With h = max(0, W₁x + b₁), in gated blocks times W₃x + b₃, the sum y = b₂ + Σ_{j: h_j ≠ 0} h_j W₂[:, j] reads the columns
    of firing units alone. Of W₃ their rows are read, and W₁ is read whole. Outputs are the same but for the order of sums.
    It pays where h has many zeros: from how many on is measured here, on the model's own weights and with torch's number
    of threads as it is now, and with fewer zeros a map is dense. Dense are also several rows (the prompt, batches), calls
    that need gradients, autocast, torch.compile and exports.

    Instances change their class, and W₂ its layout in memory; nothing else does, and files that are saved are the same.
    Undo it before you train, convert or export the model.

    Args:
        model: a ReLU network on the CPU, in fp32 or bf16.
        inputs: what its forward takes: a mapping, or a tensor where it is no transformers model; its blocks are found in a
            forward pass. Made by the architecture if it is not given, of a transformers model.

    Returns:
        The maps that are sparse, with what was measured, and why others are not. Its `undo()` puts the model back; so does
        the end of a `with` block.

    Raises:
        ValueError: the model is smooth, has no ReLU that is a module, is offloaded, not on the CPU or sparse already; or no
            inputs can be guessed for it.
        RuntimeError: there is no C++ compiler for the kernel.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> x = torch.randn(1, 64)
        >>> with torch.no_grad():
        ...     before = model(x)
        ...     with hlg.sparsify_ffn(model, x):
        ...         torch.allclose(model(x), before, atol=1e-6)
        True
    """
    check_usable(model)
    sites = relu_sites(model)
    _check_place(model)
    if inputs is None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"no inputs can be guessed for {type(model).__name__}: pass inputs=…, what its forward takes")
        inputs = example_inputs(model)
    with measuring(model):
        run = forward(model, inputs)
        blocks = feed_forwards(model, sites, run)
        report = SparseFFNReport(dense=dict(blocks.obstacles))
        candidates = _candidates(model, sites, blocks, report)
        candidates = _used_once(candidates, run, report)
    try:
        _patch(candidates, report)
    except BaseException:
        report.undo()
        raise
    return report


def _check_place(model: nn.Module) -> None:
    """An error where the kernel cannot run."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(f"{name} is on {parameter.device}: the kernel is for CPUs; call model.to('cpu') first")
    if any(isinstance(module, SPARSE) for module in model.modules()):
        raise ValueError("the model is sparse already: call undo() of the report first")
    reason = sparse_products.unavailable()
    if reason is not None:
        raise RuntimeError(f"{reason}. The model is as it was")


@dataclass
class _Candidate:
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


def _patch(candidates: list[_Candidate], report: SparseFFNReport) -> None:
    """Change the classes of those modules for which it pays."""
    for candidate in candidates:
        if candidate.cls is SparseDown:  # the layout first, since it decides the time of the dense product too
            _lay(candidate.module, rows=True)
            report._patched.append((candidate.module, type(candidate.module)))
    groups: dict[tuple[Any, ...], list[_Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.cls, candidate.shape, _weight(candidate.module).dtype), []).append(candidate)
    measured = {key: _measure(group) for key, group in groups.items()}
    for candidate in candidates:
        found = measured[candidate.cls, candidate.shape, _weight(candidate.module).dtype]
        units = candidate.shape[1] if candidate.cls is SparseUp else candidate.shape[0]
        most = int(found.most * units)
        if not most:
            report.dense[candidate.name] = "the kernel was slower than the dense product however few units fire"
            if candidate.cls is SparseDown:
                _lay(candidate.module, rows=False)
            continue
        report._patched.append((candidate.module, type(candidate.module)))
        candidate.module.sparse_most = most  # type: ignore[assignment]
        if candidate.site is not None:
            report._patched.append((candidate.site, type(candidate.site)))
            candidate.site.sparse_fired = candidate.module.sparse_fired = Fired()  # type: ignore[assignment]
            candidate.site.__class__ = SparseReLU
        candidate.module.__class__ = candidate.cls
        report.maps.append(SparseMap(candidate.name, candidate.shape, found.dense, found.at_tenth, 1 - found.most))


def _candidates(
    model: nn.Module, sites: Mapping[str, nn.Module], blocks: Blocks, report: SparseFFNReport
) -> list[_Candidate]:
    """The maps of the blocks that may become sparse; why others may not goes into the report."""
    found = []
    for block in blocks.found.values():
        for made in filter(None, (block.up, block.after)):
            name = made.name.rpartition(".")[0]
            module, site = model.get_submodule(name), sites[block.site]
            reason = _reason(made, module) or (_reason_of_up(module, site, block) if made is block.up else "")
            if reason:
                report.dense[name] = reason
            elif made is block.up:
                found.append(_Candidate(name, module, SparseUp, made.shape, site))
            else:
                cls = SparseDown if type(module) is nn.Linear else SparseConv1D
                found.append(_Candidate(name, module, cls, made.shape))
    return found


def _reason_of_up(module: nn.Module, site: nn.Module, block: FeedForward) -> str:
    if type(module) is not nn.Linear or type(site) is not nn.ReLU:
        return f"it is a {type(module).__name__}, and its ReLU a {type(site).__name__}"
    return "" if block.up_last else "it runs before the ReLU, which says what fires"


def _used_once(candidates: list[_Candidate], run: Callable[[], Any], report: SparseFFNReport) -> list[_Candidate]:
    """Without the maps W₃ whose outputs something besides the block uses: without some of them the outputs would change."""
    ups = [candidate for candidate in candidates if candidate.site is not None]
    expected = [output.clone() for output in float_outputs(run())] if ups else []
    used = (
        [] if not ups or _same_without(ups, run, expected) else [up for up in ups if not _same_without([up], run, expected)]
    )
    report.dense.update({up.name: "something else uses what it puts out" for up in used})
    return [candidate for candidate in candidates if candidate not in used]


def _same_without(ups: list[_Candidate], run: Callable[[], Any], expected: list[Tensor]) -> bool:
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


def _measure(group: list[_Candidate]) -> Crossover:
    """Time the maps of one class, shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    dense, sparse = [], []
    for candidate in group:
        weight, (d, k) = _weight(candidate.module), candidate.shape
        x = torch.randn(1, d, generator=generator).to(weight.dtype)
        dense.append(partial(candidate.module.forward, x))  # without hooks, which are not to see this
        bias: Tensor | None = candidate.module.bias  # type: ignore[assignment]
        units = k if candidate.cls is SparseUp else d
        rows = weight.t() if candidate.cls is SparseDown else weight
        # beforehand, so that drawing is not timed; as many as rounds, since tokens let unlike units fire
        drawn = {share: [firing(units, share, weight.dtype, generator) for _ in range(ROUNDS)] for share in FIRING}
        sparse.append(partial(_kernel, candidate.cls is SparseUp, drawn, x, rows, bias))
    return crossover(dense, sparse)


def _kernel(
    up: bool, drawn: dict[float, list[Tensor]], x: Tensor, rows: Tensor, bias: Tensor | None, share: float
) -> Tensor | None:
    drawn[share].append(fired := drawn[share].pop(0))
    if up:
        return sparse_products.chosen(fired, x, rows, bias, fired.numel())
    return sparse_products.gathered(fired, rows, bias, fired.numel())


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _lay(module: nn.Module, rows: bool) -> None:
    """Let the columns of a weight (k, d) be rows in memory, or not; a weight that lies so already is left alone."""
    weight = _weight(module)
    lies = weight.t().is_contiguous() if rows else weight.is_contiguous()
    if not lies:
        weight.data = weight.data.t().contiguous().t() if rows else weight.data.contiguous()


def _set_class(module: nn.Module, before: type[nn.Module]) -> None:
    """Undo what `_patch` did to a module."""
    module.__class__ = before
    for attribute in ("sparse_most", "sparse_fired"):
        vars(module).pop(attribute, None)
    if before is nn.Linear:
        _lay(module, rows=False)
