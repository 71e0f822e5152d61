"""The model of a checkpoint whose weights stay in its files, as views of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..activation.module import hardness_sites
from ..activation.older_checkpoints import NAME, OLDER
from ..structure.file_source import FileSource, Place, check_same, file_state
from ..structure.hard_coded import hard_coded_sites
from ..structure.loading import CheckpointError, load_without_reading
from ..surgery.conversion import convert
from .on_disk_files import Source
from .shards import Replacement, mapped_tensors


class Streamed:
    """The model of a checkpoint whose weights stay in its files.

    Attributes:
        model: its parameters are views of the files.
        source: brings the weights of a block in.
        names: parameter → what the checkpoint calls it.
        hardness: the names of the checkpoint's λ.
    """

    def __init__(self, files: Source, device: torch.device) -> None:
        self.files = files
        states = {shard.path: file_state(shard.path) for shard in files.shards}
        found = {shard.path: mapped_tensors(shard.path) for shard in files.shards}
        self.places = [Place(path, 0, state) for path, state in states.items()]
        tensors = {name: view for views in found.values() for name, (view, _) in views.items()}
        if len(tensors) < sum(map(len, found.values())):
            raise CheckpointError(f"{str(files.folder)!r} holds a tensor in two of its files: fetch it again")
        self.hardness = {name for name in tensors if name.rpartition(".")[2] in (NAME, OLDER)}
        if files.config.__dict__.get("quantization_config") is not None:
            raise ValueError(
                f"{str(files.folder)!r} is quantised and cannot be refit: substitute first, then quantise the ReLU model"
            )
        self.model = load_without_reading(files.folder, files.config, files.cls, tensors)
        self.source = FileSource(self.model, device)
        called = {view.data_ptr(): name for name, view in tensors.items() if view.numel()}
        self.names = {p: called[p.data_ptr()] for p in self.model.parameters() if _is_view(p, called, tensors)}
        for name, p in self.model.named_parameters():  # a tied bias is padded, to the length that it has
            if p not in self.names and name in tensors and p.dim() == 1 and torch.equal(p, tensors[name]):
                self.names[p] = name
        self._check_views()
        for path, views in found.items():
            for name, (view, offset) in views.items():
                if name not in self.hardness and view.numel():
                    self.source.add(view, Place(path, offset, states[path]))
        if not hardness_sites(self.model):
            convert(self.model)
        free = hard_coded_sites(self.model)
        if free:
            raise CheckpointError(
                f"no config attribute governs {free[0]}, so that λ has to go into the weights: load the model and call "
                "relu_ize"
            )

    def _check_views(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter not in self.names and name.rpartition(".")[2] != NAME and parameter.numel():
                raise CheckpointError(
                    f"the checkpoint holds {name} in another form or dtype than {type(self.model).__name__} has it (merged "
                    "from several tensors, as experts are, or cast), so that it cannot be refit in its files: load the "
                    "model and call relu_ize"
                )

    def check_unchanged(self) -> None:
        """FileChanged if a weight file is not what it was."""
        for place in self.places:
            check_same(place)

    def changed(self) -> dict[str, Replacement]:
        """{what the checkpoint calls it: its new bytes} of the weights that were refit."""
        changed = self.source.changed
        return {self.names[p]: Replacement(path, tuple(p.shape)) for p, path in changed.items() if p in self.names}

    def new(self) -> dict[nn.Parameter, str]:
        """The biases that maps were given, with the model's names."""
        known = {*self.names, *(site.unclipped_hardness for site in hardness_sites(self.model).values())}
        return {p: name for name, p in self.model.named_parameters() if p not in known}

    def added(self) -> dict[str, Tensor]:
        """The biases that maps were given, by the model's names."""
        return {name: p.detach().to("cpu") for p, name in self.new().items()}


def _is_view(parameter: nn.Parameter, called: Mapping[int, str], tensors: Mapping[str, Tensor]) -> bool:
    name = called.get(parameter.data_ptr())
    if name is None:
        return False
    view = tensors[name]
    return (view.shape, view.dtype, view.stride()) == (parameter.shape, parameter.dtype, parameter.stride())
