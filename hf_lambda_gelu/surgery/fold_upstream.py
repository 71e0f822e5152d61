"""The pass that follows autograd's graph: which weights make what enters a site, and which maps its output comes to.

From what enters a site back to the maps that made it, through nothing but views, sums and products with constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.module import LambdaGELU
from ..structure.hooks import Hooks
from ..structure.linear_calls import LinearCall
from ..structure.linear_maps import LinearMap, watch_linears
from ..structure.tracing import ancestors
from ..structure.unread_maps import differentiable, operation_of
from .fold_scales import Fold, Obstacle, Scale, Weights

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


class UpstreamWalk:
    """One forward pass in which the output of each site and each linear map is a leaf of autograd's graph.

    Attributes:
        calls: the linear maps in order, with the sites whose output each takes up.
        added: site → the parameters that are added to its output.
        called: the sites that ran.
    """

    def __init__(self, weights: Weights, folds: Mapping[str, Fold]) -> None:
        self.weights, self.folds = weights, folds
        self.calls: list[tuple[LinearCall, set[str]]] = []
        self.added: dict[str, set[nn.Parameter]] = {}
        self.called: set[str] = set()
        self._leaves: dict[int, int | str] = {}  # id of a leaf → the call, or the site, that put it out
        self._kept: list[Tensor] = []  # or another leaf might get the id of one that is gone

    def run(self, model: nn.Module, sites: Mapping[str, LambdaGELU], forward: Callable[[], Any]) -> None:
        """Run the model, and let each fold have what makes its site's input."""
        with differentiable(model), Hooks() as hooks, torch.enable_grad(), watch_linears(self._on_linear):
            for name, site in sites.items():
                hooks.after(site, partial(self._on_site, name))
            forward()

    def _leaf(self, output: Tensor, what: int | str) -> Tensor:
        made = output.detach().requires_grad_()
        self._kept.append(made)
        self._leaves[id(made)] = what
        return made.clone()  # the model may change it in place, which a leaf does not allow

    def _on_linear(self, call: LinearCall) -> Tensor | None:
        if not call.output.is_floating_point():
            return None
        found: set[str] = set()
        for node in ancestors(call.input.grad_fn):
            what = self._what(node)
            if isinstance(what, str):
                found.add(what)
        for name in found:
            self.added.setdefault(name, set()).update(self._addends(call.input.grad_fn))
        self.calls.append((call, found))
        return self._leaf(call.output, len(self.calls) - 1)

    def _on_site(self, name: str, site: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        fold = self.folds[name]
        self.called.add(name)
        if not fold.obstacle:
            try:
                fold.scale(*self._producers(args[0]))
            except Obstacle as obstacle:
                fold.refuse(str(obstacle))
        return self._leaf(output, name)

    def _what(self, node: Any) -> int | str | None:
        """The call or the site whose output the node of autograd's graph is."""
        variable = getattr(node, "variable", None)
        return None if variable is None else self._leaves.get(id(variable))

    def _addends(self, node: Any) -> Iterator[nn.Parameter]:
        """Parameters that are a summand of the tensor that `node` made."""
        if node is None:
            return
        variable = getattr(node, "variable", None)
        if variable in self.weights.names:
            yield variable
        elif operation_of(node) in _VIEWS | _SUMS:
            for parent, _ in node.next_functions:
                yield from self._addends(parent)

    def _producers(self, entering: Tensor) -> Iterator[Scale]:
        """What makes the tensor that enters a site: maps, or the channels of them that reach it, and other parameters."""
        calls: dict[int, Tensor] = {}
        if entering.grad_fn is None:
            raise Obstacle("it takes the model's input itself")
        for target in self._scalable(entering.grad_fn):
            if isinstance(target, nn.Parameter):
                yield self.weights.whole(target)
            else:
                index = self._leaves[id(target)]
                assert isinstance(index, int)  # of a site, `_scalable` would have raised
                calls[index] = target
        if not calls:
            return
        # a fused projection: only the channels that reach the site
        ones = torch.ones_like(entering)
        grads = torch.autograd.grad(entering, list(calls.values()), ones, retain_graph=True, allow_unused=True)
        for index, grad in zip(calls, grads, strict=True):
            call = self.calls[index][0]
            rows = None if grad is None else grad.reshape(-1, grad.shape[-1]).ne(0).any(0)
            if rows is not None and bool(rows.any()):
                yield from self._rows(call, None if bool(rows.all()) else rows)

    def _scalable(self, node: Any) -> Iterator[Any]:
        """Leaves and parameters that scale what `node` made, all of them together by the same factor."""
        if node is None:
            raise Obstacle("a constant is added before it")
        variable = getattr(node, "variable", None)
        kind = operation_of(node)
        if variable is not None:
            what = self._leaves.get(id(variable))
            if isinstance(what, str):
                raise Obstacle(f"it takes the output of {what} as it is")
            if what is None and variable not in self.weights.names:
                raise Obstacle("it takes the model's input itself")
            yield variable
        elif kind in _SUMS:
            for parent, _ in node.next_functions:
                yield from self._scalable(parent)
        elif kind in _VIEWS or kind == "Div":
            yield from self._scalable(node.next_functions[0][0])
        elif kind == "Mul":
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            own = [p for p in parents if getattr(p, "variable", None) in self.weights.names]
            yield from self._scalable((own or parents)[0])
        elif kind in _AFFINE:
            held = [getattr(parent, "variable", None) for parent, _ in node.next_functions[1:] if parent is not None]
            if not held or any(parameter not in self.weights.names for parameter in held):
                raise Obstacle(f"{kind} before it has no weight to scale")
            yield from held
        else:
            raise Obstacle(f"{kind} stands between it and what makes its input")

    def _rows(self, call: LinearCall, rows: Tensor | None) -> Iterator[Scale]:
        for linear in self.weights.maps(call):
            yield Scale(linear.label, linear.parameter, linear.index, rows, _output_dim(linear))
            if linear.bias is not None:
                yield Scale(self.weights.names[linear.bias], linear.bias, linear.index, rows)


def _output_dim(linear: LinearMap) -> int:
    return 1 if linear.transposed else 0
