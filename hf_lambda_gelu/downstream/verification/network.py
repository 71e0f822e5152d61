"""Reads a piecewise-linear network from its modules: affine maps in float64, with ReLU after some of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...activation.module import LambdaGELU
from ...structure.modules import joined, probed_base
from ...structure.offloading import check_not_offloaded

Array = NDArray[np.float64]

_KNOWN = "nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout in eval mode, and nn.Sequential of these"


@dataclass(frozen=True)
class Layer:
    """h ↦ ReLU(W h + b), or W h + b where `relu` is False.

    Attributes:
        weight: W, shape (k, d), the parameter's own values: float32 and below are exact in float64.
        bias: b, shape (k,).
    """

    weight: Array
    bias: Array
    relu: bool


def read_network(model: nn.Module) -> list[Layer]:
    """The layers of a network, in order.

    Raises:
        ValueError: a module that is none of those known, smooth activations first among them; weights that are not finite
            or not there; no linear layer.
    """
    check_not_offloaded(model)
    layers: list[Layer] = []
    for name, module in _leaves(model):
        if type(module) is nn.Linear:
            layers.append(_linear(name, module, layers))
        elif type(module) is nn.ReLU:
            _add_relu(layers, name)
        elif type(module) is nn.Dropout and module.training:
            raise ValueError(f"{name or 'the model'} is nn.Dropout in training mode: call model.eval() first")
        elif type(module) is nn.Flatten:
            _check_flatten(name, module, first=not layers)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear: there is nothing to verify")
    return layers


def in_float64(model: nn.Module) -> nn.Module:
    """A copy on the CPU that computes in float64."""
    with torch.inference_mode(False):  # gradients to its inputs will be asked for
        return copy.deepcopy(model).to("cpu", torch.float64).eval().requires_grad_(False)


def check_as_read(
    model: nn.Module, layers: list[Layer], inputs: Tensor, compute: Callable[[Array], Array] | None = None
) -> None:
    """ValueError unless the float64 `model` computes what its layers do: a hook may change what a module puts out.

    Args:
        compute: rows → outputs; by default `values` of the layers.
    """
    with torch.no_grad():
        try:
            outputs = model(inputs)
        except RuntimeError as error:
            raise ValueError(
                f"the model does not take inputs of shape {tuple(inputs.shape)} (the first dimension counts them): {error}"
            ) from error
    width = layers[0].weight.shape[1]
    rows = inputs.flatten(1).numpy()
    if outputs.dim() != 2 or rows.shape[1] != width:
        raise ValueError(
            f"inputs of shape {tuple(inputs.shape)} give outputs of shape {tuple(outputs.shape)}: expected inputs of "
            f"{width} numbers each and outputs (inputs, classes). Images need an nn.Flatten() first; of a network that "
            "works token by token, pass the tokens as rows"
        )
    expected = values(layers, rows) if compute is None else compute(rows)
    if not np.allclose(outputs.numpy(), expected, rtol=1e-9, atol=1e-9 * max(1.0, float(np.abs(expected).max(initial=0.0)))):
        raise ValueError(
            "the model puts out something else than its layers compute, by "
            f"{float(np.abs(outputs.numpy() - expected).max()):.3g}: does a forward hook or a parametrization change it?"
        )


def values(layers: list[Layer], rows: Array) -> Array:
    """What the network puts out for each row, in float64."""
    for layer in layers:
        rows = rows @ layer.weight.T + layer.bias
        if layer.relu:
            rows = np.maximum(rows, 0.0)
    return rows


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child_name, child in module.named_children():
            yield from _leaves(child, joined(name, child_name))
        return
    what = f"{name or 'the model'} ({type(module).__name__})"
    if isinstance(module, LambdaGELU) or probed_base(module) is not None:
        raise ValueError(
            f"{what} is smooth, and exact solvers need piecewise-linear networks: make it ReLU first, by "
            "hf_lambda_gelu.convert(model) and hf_lambda_gelu.relu_ize(model, …)"
        )
    if type(module) not in (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout):
        raise ValueError(
            f"{what} is no layer that can be verified: expected {_KNOWN}. Of a transformers model, take a part: its "
            "classifier head, or a block by hf_lambda_gelu.feed_forward(model, site)"
        )
    yield name, module


def _linear(name: str, module: nn.Linear, before: list[Layer]) -> Layer:
    parameters: dict[str, Any] = {"weight": module.weight, "bias": module.bias}
    arrays = {}
    for leaf, parameter in parameters.items():
        if parameter is None:
            arrays[leaf] = np.zeros(module.out_features)
            continue
        if parameter.is_meta:
            raise ValueError(f"{joined(name, leaf)} is on the meta device, where weights have no values: load them first")
        arrays[leaf] = parameter.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(arrays[leaf]).all():
            raise ValueError(f"{joined(name, leaf)} holds values that are not finite: nothing can be proven of it")
    if before and before[-1].weight.shape[0] != module.in_features:
        raise ValueError(
            f"{name} takes {module.in_features} features, and the layer before it puts out {before[-1].weight.shape[0]}"
        )
    return Layer(arrays["weight"], arrays["bias"], relu=False)


def _add_relu(layers: list[Layer], name: str) -> None:
    if not layers:
        raise ValueError(f"{name or 'the model'} is a ReLU with no nn.Linear before it: start the network with a nn.Linear")
    layers[-1] = Layer(layers[-1].weight, layers[-1].bias, relu=True)


def _check_flatten(name: str, module: nn.Flatten, first: bool) -> None:
    if first and (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(
            f"{name} flattens dimensions {module.start_dim} to {module.end_dim}: expected 1 to -1, all of an input"
        )
