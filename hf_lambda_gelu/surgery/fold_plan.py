"""Which weights the scale of an activation can be moved into: found by running the model and following autograd's graph.

Upstream: from what enters a site back to the maps that made it, through nothing but views, sums and products with constants.
Downstream: to the linear maps that take its output up, where doubling the output must double their input (or not change it,
behind a normalisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import LambdaGELU
from ..structure.linear_maps import LinearCall, LinearMap, Parameters, all_experts, watch_linears
from ..structure.tracing import ancestors

# nodes of autograd's graph, without the digit at their end
# fmt: off
_VIEWS = frozenset({
    "Alias", "AsStrided", "Clone", "Contiguous", "Copy", "CopySlices", "Diagonal", "Expand", "Flatten", "Identity",
    "Index", "IndexSelect", "MovedimInt", "Narrow", "Permute", "ReshapeAlias", "Reshape", "Select", "Slice",
    "SplitWithSizes", "Split", "SqueezeMultiple", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "Unfold",
    "UnsafeSplit", "UnsafeView", "Unsqueeze", "View", "Roll", "Flip", "ConstantPadNd",
})
# fmt: on
_SUMS = frozenset({"Add", "Sub", "Cat", "Stack"})
# linear in the weight and bias that they hold
_AFFINE = ("NativeBatchNorm", "CudnnBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "Convolution")


@dataclass(frozen=True)
class Scale:
    """A parameter, or rows of it, to scale.

    Attributes:
        label: what a report calls it.
        parameter: the parameter.
        index: which expert; None otherwise.
        rows: which output channels (k,), along `dim` of the parameter or expert; None for all.
    """

    label: str
    parameter: nn.Parameter
    index: int | None = None
    rows: Tensor | None = None
    dim: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for the same elements."""
        rows = None if self.rows is None or bool(self.rows.all()) else tuple(self.rows.tolist())
        return id(self.parameter), self.index, rows

    @torch.no_grad()
    def apply(self, factor: float) -> None:
        place = self.parameter.data if self.index is None else self.parameter.data[self.index]
        factors = torch.full((), factor, dtype=torch.float64, device=place.device)
        if self.rows is not None:
            shape = [-1 if d == self.dim else 1 for d in range(place.dim())]
            factors = torch.where(self.rows.to(place.device), factors, 1.0).reshape(shape)
        place.copy_(place.double() * factors)


@dataclass
class Fold:
    """Where the scale of one site goes.

    Attributes:
        scaled: takes λ: what makes the site's input, and biases that are added to its output.
        divided: takes 1/λ.
        obstacle: why there is no such place; empty if there is.
    """

    site: str
    scaled: list[Scale] = field(default_factory=list)
    divided: list[Scale] = field(default_factory=list)
    obstacle: str = ""


class _Obstacle(Exception):
    pass


def plan(model: nn.Module, sites: Mapping[str, LambdaGELU], run: Callable[[], Any]) -> dict[str, Fold]:
    """Run the model twice, and find for every site the weights that λ can go into."""
    folds = {name: Fold(name) for name in sites}
    with _differentiable(model):
        walk = _Walk(model, sites, folds)
        walk.trace(run)
    walk.double(run)
    for name, fold in folds.items():
        if not fold.obstacle and name not in walk.called:
            fold.obstacle = "the inputs never reach it"
        elif not fold.obstacle and name not in walk.taken:
            fold.obstacle = "no linear map takes up its output"
    _check_shared(folds, sites)
    return folds


class _Walk:
    """The two passes: one that follows the graph, one in which every site puts out twice as much."""

    def __init__(self, model: nn.Module, sites: Mapping[str, LambdaGELU], folds: dict[str, Fold]) -> None:
        self.sites, self.folds = sites, folds
        self.parameters = Parameters(model)
        self.names = {parameter: names[0] for parameter, names in self.parameters.names.items()}
        self.calls: list[tuple[LinearCall, set[str]]] = []  # in order; with the sites whose output they take up
        self.added: dict[str, set[nn.Parameter]] = {}  # site → parameters added to its output
        self.called: set[str] = set()
        self.taken: set[str] = set()
        self.leaves: dict[int, int | str] = {}  # id of a leaf → the call, or the site, that put it out
        self.kept: list[Tensor] = []

    # ------------------------------------------------------------------------------------------------- upstream

    def trace(self, run: Callable[[], Any]) -> None:
        with ExitStack() as stack:
            for name, site in self.sites.items():
                handle = site.register_forward_hook(
                    lambda module, args, output, name=name: self._on_site(name, args, output)
                )
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(watch_linears(self._on_linear))
            run()

    def _leaf(self, output: Tensor, what: int | str) -> Tensor:
        made = output.detach().requires_grad_()
        self.kept.append(made)
        self.leaves[id(made)] = what
        return made.clone()  # the model may change it in place, which a leaf does not allow

    def _on_linear(self, call: LinearCall) -> Tensor | None:
        if not call.output.is_floating_point():
            return None
        found: set[str] = set()
        for node in ancestors(call.input):
            what = self._what(node)
            if isinstance(what, str):
                found.add(what)
        for name in found:
            self.added.setdefault(name, set()).update(self._addends(call.input.grad_fn))
        self.calls.append((call, found))
        return self._leaf(call.output, len(self.calls) - 1)

    def _on_site(self, name: str, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fold = self.folds[name]
        self.called.add(name)
        if not fold.obstacle:
            try:
                for scale in self._producers(args[0]):
                    if all(scale.key != other.key for other in fold.scaled):
                        fold.scaled.append(scale)
            except _Obstacle as obstacle:
                fold.obstacle = str(obstacle)
        return self._leaf(output, name)

    def _what(self, node: Any) -> int | str | None:
        variable = getattr(node, "variable", None)
        return None if variable is None else self.leaves.get(id(variable))

    def _addends(self, node: Any) -> Iterator[nn.Parameter]:
        """Parameters that are a summand of the tensor that `node` made."""
        if node is None:
            return
        variable = getattr(node, "variable", None)
        if variable in self.names:
            yield variable
        elif _kind(node) in _VIEWS | _SUMS:
            for parent, _ in node.next_functions:
                yield from self._addends(parent)

    def _producers(self, entering: Tensor) -> Iterator[Scale]:
        calls: dict[int, Tensor] = {}
        if entering.grad_fn is None:
            raise _Obstacle("it takes the model's input itself")
        for target in self._scalable(entering.grad_fn):
            if isinstance(target, nn.Parameter):
                yield self._whole(target)
            else:
                index = self.leaves[id(target)]
                calls[index] = target
        if not calls:
            return
        # a fused projection: only the channels that reach the site
        ones = torch.ones_like(entering)
        grads = torch.autograd.grad(entering, list(calls.values()), ones, retain_graph=True, allow_unused=True)
        for index, grad in zip(calls, grads, strict=True):
            call = self.calls[index][0]
            rows = None if grad is None else grad.reshape(-1, grad.shape[-1]).ne(0).any(0)
            if rows is None or not bool(rows.any()):
                continue
            yield from self._rows(call, None if bool(rows.all()) else rows)

    def _scalable(self, node: Any) -> Iterator[Any]:
        """Leaves and parameters that scale what `node` made, all of them together by the same factor."""
        if node is None:
            raise _Obstacle("a constant is added before it")
        variable = getattr(node, "variable", None)
        kind = _kind(node)
        if variable is not None:
            what = self.leaves.get(id(variable))
            if isinstance(what, str):
                raise _Obstacle(f"it takes the output of {what} as it is")
            if what is None and variable not in self.names:
                raise _Obstacle("it takes the model's input itself")
            yield variable
        elif kind in _SUMS:
            for parent, _ in node.next_functions:
                yield from self._scalable(parent)
        elif kind in _VIEWS or kind == "Div":
            yield from self._scalable(node.next_functions[0][0])
        elif kind == "Mul":
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            own = [p for p in parents if getattr(p, "variable", None) in self.names]
            yield from self._scalable((own or parents)[0])
        elif kind in _AFFINE:
            held = [getattr(parent, "variable", None) for parent, _ in node.next_functions[1:] if parent is not None]
            if not held or any(parameter not in self.names for parameter in held):
                raise _Obstacle(f"{kind} before it has no weight to scale")
            yield from held
        else:
            raise _Obstacle(f"{kind} stands between it and what makes its input")

    def _whole(self, parameter: nn.Parameter) -> Scale:
        names = self.parameters.names[parameter]
        if len(names) > 1:
            raise _Obstacle(f"{names[0]} is shared with {names[1]}")
        return Scale(names[0], parameter)

    def _rows(self, call: LinearCall, rows: Tensor | None) -> Iterator[Scale]:
        for linear in self._maps(call):
            yield Scale(linear.label, linear.parameter, linear.index, rows, _output_dim(linear))
            if linear.bias is not None:
                yield Scale(self.names[linear.bias], linear.bias, linear.index, rows)

    def _maps(self, call: LinearCall) -> list[LinearMap]:
        linear = self.parameters.find(call)
        if linear is None:
            raise _Obstacle("a weight next to it is no parameter of the model as it stands")
        shared = self.parameters.other_names(linear.name)
        if shared:
            raise _Obstacle(f"{linear.name} is shared with {shared[0]}")
        return all_experts([linear])

    # ----------------------------------------------------------------------------------------------- downstream

    @torch.no_grad()
    def double(self, run: Callable[[], Any]) -> None:
        """Twice the output at every site: each map that takes it up gets its first input back afterwards."""
        order = iter(self.calls)

        def on_linear(call: LinearCall) -> Tensor | None:
            if not call.output.is_floating_point():
                return None
            first, found = next(order, (None, set()))
            if first is None or first.input.shape != call.input.shape:
                for name in self.sites:
                    self.folds[name].obstacle = self.folds[name].obstacle or "the model calls other maps each time"
                return None
            if found:
                self._take(first, call.input, found)
            return first.output.detach()

        added = {parameter for several in self.added.values() for parameter in several}
        with ExitStack() as stack:
            for site in self.sites.values():
                stack.callback(site.register_forward_hook(lambda module, args, output: output * 2.0).remove)
            for parameter in added:
                before = parameter.data
                stack.callback(setattr, parameter, "data", before)
                parameter.data = before * 2.0
            stack.enter_context(watch_linears(on_linear))
            run()

    def _take(self, call: LinearCall, now: Tensor, found: set[str]) -> None:
        before = call.input.detach()
        scale = float(before.abs().max()) if before.numel() else 0.0
        self.taken |= found
        if torch.allclose(now, before * 2.0, rtol=0.0, atol=1e-4 * scale):
            for name in found:
                fold = self.folds[name]
                try:
                    for linear in self._maps(call):
                        made = Scale(linear.label, linear.parameter, linear.index)
                        if all(made.key != other.key for other in fold.divided):
                            fold.divided.append(made)
                    for parameter in self.added[name]:
                        made = self._whole(parameter)
                        if all(made.key != other.key for other in fold.scaled):
                            fold.scaled.append(made)
                except _Obstacle as obstacle:
                    fold.obstacle = fold.obstacle or str(obstacle)
        elif not torch.allclose(now, before, rtol=0.0, atol=1e-2 * scale):  # a normalisation leaves its ε
            for name in found:
                self.folds[name].obstacle = self.folds[name].obstacle or "its output is mixed with something else"


def _check_shared(folds: Mapping[str, Fold], sites: Mapping[str, LambdaGELU]) -> None:
    """Sites that scale the same weight must have the same λ."""
    for kind in ("scaled", "divided"):
        owners: dict[tuple[Any, ...], str] = {}
        for name, made in folds.items():
            for scale in getattr(made, kind):
                other = owners.setdefault(scale.key, name)
                if sites[other].hardness.item() != sites[name].hardness.item():
                    made.obstacle = made.obstacle or f"{scale.label} serves {other} too, whose λ differs"


def _kind(node: Any) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward").removeprefix("torch::autograd::")


def _output_dim(linear: LinearMap) -> int:
    return 1 if linear.transposed else 0


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Within the block, every floating point parameter takes part in the graph."""
    frozen: Iterable[nn.Parameter] = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
