"""Parameters, or rows of them, that take up the scale of a site; and how they are found from what torch computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.linear_calls import LinearCall
from ..structure.linear_maps import LinearMap, Parameters, all_parts


class Obstacle(Exception):
    """Why the scale of a site has nowhere to go; caught where the site is known."""


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

    def scale(self, *scales: Scale) -> None:
        """These take λ."""
        _extend(self.scaled, scales)

    def divide(self, *scales: Scale) -> None:
        """These take 1/λ."""
        _extend(self.divided, scales)

    def refuse(self, obstacle: str) -> None:
        """There is no place for λ; the first reason counts."""
        self.obstacle = self.obstacle or obstacle


def _extend(places: list[Scale], more: tuple[Scale, ...]) -> None:
    for scale in more:
        if all(scale.key != other.key for other in places):
            places.append(scale)


class Weights:
    """The parameters of a model, as places for a scale: none that is shared, which would scale something else too.

    Attributes:
        names: parameter → its first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = Parameters(model)
        self.names = {parameter: names[0] for parameter, names in self._parameters.names.items()}

    def whole(self, parameter: nn.Parameter) -> Scale:
        names = self._parameters.names[parameter]
        if len(names) > 1:
            raise Obstacle(f"{names[0]} is shared with {names[1]}")
        return Scale(names[0], parameter)

    def maps(self, call: LinearCall) -> list[LinearMap]:
        """The linear map that was computed; of an expert, all of them."""
        linear = self._parameters.find(call)
        if linear is None:
            raise Obstacle("a weight next to it is no parameter of the model as it stands")
        shared = self._parameters.other_names(linear.name)
        if shared:
            raise Obstacle(f"{linear.name} is shared with {shared[0]}")
        return all_parts([replace(linear, groups=1)])
