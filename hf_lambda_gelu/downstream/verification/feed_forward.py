"""`feed_forward`: takes a block, linear map, activation, linear map, out of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...measurement.examples.choice import example_inputs
from ...measurement.forward import evaluating
from ...structure.hooks import Hooks
from ...structure.linear_calls import LinearCall
from ...structure.linear_maps import watch_linears
from ...structure.modules import is_activation
from ...structure.offloading import check_not_offloaded
from ...structure.transaction import transaction
from ...surgery.folding import forward


@transaction
def feed_forward(model: nn.Module, site: str, inputs: Any = None) -> tuple[nn.Sequential, Tensor]:
    """The block around an activation, as an nn.Sequential of its own, and what entered it: down(activation(up(x))).

    The model runs once. The linear map whose output is what enters the activation and the one that takes up what leaves it
    make the block, whatever class they are of (Conv1D becomes nn.Linear); dropout, normalisations and the residual stream
    are outside. It is what `verify_robustness` takes where the model is ReLU, and `certified_distance` where it is smooth.

    Args:
        model: in any dtype, on real devices; it is left as it was.
        site: the activation's module name, as in `hardness_sites` and in the reports of `relu_ize`.
        inputs: arguments of forward: a mapping, a tensor, or a tuple of tensors. By default a small batch made to fit a
            transformers model.

    Returns:
        The block, a copy on the model's device and in its dtype.
        What came into it, (positions, features), padding among them; of a block that is called several times (ALBERT) at the
            first call.

    Raises:
        ValueError: no activation of that name, one that is not called, or one whose output goes elsewhere: in a gated block
            (Llama) it is multiplied by another, and the block is not piecewise linear.

    Examples:
        >>> import hf_lambda_gelu as hlg, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1))
        >>> block, rows = hlg.feed_forward(model, "1", torch.randn(2, 4))
        >>> block
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=3, bias=True)
        )
        >>> rows.shape
        torch.Size([2, 4])
    """
    check_not_offloaded(model)
    module = dict(model.named_modules(remove_duplicate=False)).get(site)
    if module is None or not is_activation(module):
        names = [name for name, known in model.named_modules(remove_duplicate=False) if is_activation(known)]
        raise ValueError(f"no activation called {site!r}: the model has {', '.join(names) or 'none'}")
    if inputs is None and not isinstance(model, PreTrainedModel):
        raise ValueError(f"no inputs can be guessed for {type(model).__name__}: pass inputs=…, what its forward takes")
    up, down = _around(model, module, site, example_inputs(model) if inputs is None else inputs)  # type: ignore[arg-type]
    block = nn.Sequential(_linear(up), copy.deepcopy(module), _linear(down)).eval()
    return block, _rows(up.input).clone()


def _around(model: nn.Module, module: nn.Module, site: str, inputs: Any) -> tuple[LinearCall, LinearCall]:
    """The linear maps before and after the first call of the activation."""
    calls: list[LinearCall] = []
    seen: list[tuple[int, Tensor, Tensor]] = []

    def on_site(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not seen:
            seen.append((len(calls), _rows(args[0]).clone(), _rows(output).clone()))

    def on_linear(call: LinearCall) -> None:
        if call.weight.dim() == 2:
            calls.append(call)

    with Hooks() as hooks, evaluating(model), torch.no_grad(), watch_linears(on_linear):
        hooks.after(module, on_site)
        forward(model, inputs)()
    if not seen:
        raise ValueError(f"{site} is not called on these inputs: pass inputs=… that reach it")
    place, entering, leaving = seen[0]
    before = next((call for call in reversed(calls[:place]) if torch.equal(_rows(call.output), entering)), None)
    after = next((call for call in calls[place:] if torch.equal(_rows(call.input), leaving)), None)
    if before is None:
        raise ValueError(f"what enters {site} is no linear map's output as it is: the block cannot be taken out")
    if after is None:
        raise ValueError(
            f"no linear map takes up what leaves {site} as it is (in a gated block it is multiplied by another): the block "
            "cannot be taken out"
        )
    return before, after


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _linear(call: LinearCall) -> nn.Linear:
    """The map as a module with a copy of its weights."""
    weight = (call.weight.T if call.transposed else call.weight).detach()
    shape, options = (weight.shape[1], weight.shape[0]), {"device": weight.device, "dtype": weight.dtype}
    # without initial values, which would take random numbers that are the user's
    made: nn.Linear = nn.utils.skip_init(nn.Linear, *shape, bias=call.bias is not None, **options)
    with torch.no_grad():
        made.weight.copy_(weight)
        if call.bias is not None:
            made.bias.copy_(call.bias)
    return made
