"""`sparsify_ffn`: decoding one token at a time, feed-forward blocks read only the weights of units that fire."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..measurement.examples.choice import example_inputs
from ..measurement.forward import measuring
from ..reports import table, to_dict
from ..structure.feed_forward_search import feed_forwards
from ..structure.transaction import transaction
from ..structure.usable import check_usable
from ..surgery.folding import forward
from . import sparse_products
from .crossover import FIRING, ROUNDS, Crossover, crossover, firing
from .relu_sites import relu_sites
from .sparse_candidates import Candidate, candidates, used_once
from .sparse_modules import SPARSE, Fired, SparseDown, SparseReLU, SparseUp


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
        found = used_once(candidates(model, sites, blocks, report.dense), run, report.dense)
    _patch(found, report)
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


def _patch(found: list[Candidate], report: SparseFFNReport) -> None:
    """Change the classes of those modules for which it pays."""
    for candidate in found:
        if candidate.cls is SparseDown:  # the layout first, since it decides the time of the dense product too
            _lay(candidate.module, rows=True)
            report._patched.append((candidate.module, type(candidate.module)))
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in found:
        groups.setdefault((candidate.cls, candidate.shape, candidate.weight.dtype), []).append(candidate)
    measured = {key: _measure(group) for key, group in groups.items()}
    for candidate in found:
        times = measured[candidate.cls, candidate.shape, candidate.weight.dtype]
        units = candidate.shape[1] if candidate.cls is SparseUp else candidate.shape[0]
        most = int(times.most * units)
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
        report.maps.append(SparseMap(candidate.name, candidate.shape, times.dense, times.at_tenth, 1 - times.most))


def _measure(group: list[Candidate]) -> Crossover:
    """Time the maps of one class, shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    dense, sparse = [], []
    for candidate in group:
        weight, (d, k) = candidate.weight, candidate.shape
        x = torch.randn(1, d, generator=generator, device="cpu").to(weight.dtype)
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


def _lay(module: nn.Module, rows: bool) -> None:
    """Let the columns of a weight (k, d) be rows in memory, or not; a weight that lies so already is left alone."""
    weight = module.weight
    assert isinstance(weight, Tensor)
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
