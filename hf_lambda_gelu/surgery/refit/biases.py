"""Biases for linear maps that have none, where a config attribute can say so to a stock reload."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from ...structure.config_probe import bias_attributes
from ...structure.edits import add_bias, own_config, remove_bias, set_bias
from ...structure.linear_maps import LinearMap


class AddedBiases:
    """The biases that a model did not have. `remove` takes all of them back, also where `add` was interrupted."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names: list[str] = []
        self._paths: tuple[str, ...] = ()

    def add(self, maps: Iterable[LinearMap], needed: Iterable[LinearMap] = ()) -> str | None:
        """Give the maps a bias of zeros if config attributes can; their paths, or None with nothing changed.

        Args:
            needed: those of them that get one also where all of them cannot.
        """
        lacking: dict[str, list[LinearMap]] = {}
        for m in maps:
            if m.bias is None and m.index is None:
                lacking.setdefault(_bias_of(m), []).append(m)
        if not lacking or not isinstance(self.model, PreTrainedModel):
            return None
        found = bias_attributes(self.model, set(lacking))
        if found is None and (names := {_bias_of(m) for m in needed}):
            found = bias_attributes(self.model, names)
        if found is None:
            return None
        paths, lengths = found
        own_config(self.model)
        self._paths = paths
        for path in paths:
            set_bias(self.model, path, True)
        for name, length in lengths.items():
            self._names.append(name)
            bias = add_bias(self.model, name, length)
            for linear in lacking.get(name, ()):
                linear.bias = bias
        return ", ".join(paths)

    def remove(self) -> None:
        for name in self._names:
            remove_bias(self.model, name)
        self._names.clear()
        if isinstance(self.model, PreTrainedModel):
            for path in self._paths:
                set_bias(self.model, path, False)
        self._paths = ()


def _bias_of(linear: LinearMap) -> str:
    return linear.name.removesuffix("weight") + "bias"
