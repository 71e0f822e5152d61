"""Refit weights in a folder, while a refit runs over a checkpoint that is larger than memory.

A journal beside them says which blocks are done, so that a process that was killed is gone on with by the next one; where
the states after the last one were not found by running it, they lie there too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...structure.file_source import FileSource, Place, file_state, mapped
from ...structure.loading import CheckpointError
from .report import CompensatedSite
from .sources import RefitWeights
from .store import Store

_JOURNAL = "journal.json"
_STATES = "*.state"


class RefitFiles(RefitWeights):
    """The refit weights of a streamed model, in a folder, with the journal of what is done.

    Attributes:
        done: the names of the sites of a block, joined → what an earlier process did there, and the files of its weights.
    """

    source: FileSource

    def __init__(self, source: FileSource, folder: Path) -> None:
        super().__init__(source)
        self.folder = folder
        self._written: dict[str, tuple[str, list[int]]] = {}  # parameter → its file and its shape, since the last note
        self.done: dict[str, dict[str, object]] = {}
        self._names = {parameter: name for name, parameter in source.model.named_parameters()}

    def read_journal(self) -> None:
        """Take over what an earlier process has done; files of one that finished no block go.

        Raises:
            CheckpointError: it did other work.
        """
        try:
            found = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict):
            then, now = found["identity"], self.source.identity
            other = [name for name in {**now, **then} if then.get(name) != now.get(name)]
            if other:
                raise CheckpointError(
                    f"{str(self.folder)!r} holds {len(found['done'])} blocks that a killed process has refit, begun with "
                    f"other {', '.join(other)}: pass what it was given, to go on where it was, or delete that folder, to "
                    "start anew"
                )
            self.done = found["done"]
            return
        for path in (self.folder / _JOURNAL, *self.folder.glob("*.bin"), *self.folder.glob(_STATES)):
            path.unlink(missing_ok=True)

    def expect(self, shapes: Mapping[nn.Parameter, tuple[int, ...]]) -> None:
        self.source.expect(shapes)

    def _put_away(self, parameter: nn.Parameter) -> None:
        view = self._write(parameter)
        if self.source.streams(parameter):
            parameter.data = view

    def _write(self, parameter: nn.Parameter) -> Tensor:
        name = self._name(parameter)
        count = sum(1 for _ in self.folder.glob("*.bin"))
        path = self.folder / f"{count:06d}.bin"
        data = parameter.detach().to("cpu").contiguous()
        with path.open("wb") as file:
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        self._written[name] = path.name, list(parameter.shape)
        return self._resting(path, parameter, parameter.shape)

    def _resting(self, path: Path, like: nn.Parameter, shape: Sequence[int]) -> Tensor:
        view = mapped(path).view(like.dtype).view(tuple(shape))
        self.source.add(view, Place(path, 0, file_state(path)))
        self.source.changed[like] = path
        return view

    def _name(self, parameter: nn.Parameter) -> str:
        if parameter not in self._names:  # a bias that the model was given
            self._names = {p: name for name, p in self.source.model.named_parameters()}
        return self._names[parameter]

    # ------------------------------------------------------------------------------------------------- the journal

    def note(
        self,
        sites: Sequence[str],
        made: Sequence[CompensatedSite],
        store: Store,
        states: Sequence[str],
        wider: Mapping[str, Any],
    ) -> None:
        """Let the journal say that a block is done: its reports, the files of its weights, and of states after it.

        States of an earlier block are not needed any more where there are such of a later one.
        """
        kept = self._copied(store, states)
        if kept:
            self.done = {name: {**entry, "states": {}} for name, entry in self.done.items()}
        reports = [asdict(site) for site in made]
        self.done["\n".join(sites)] = {"sites": reports, "files": self._written, "states": kept, "wider": wider}
        self._written = {}
        self._write_journal()
        if kept:
            for path in self.folder.glob(_STATES):
                if path.name not in {file for file, _ in kept.values()}:
                    path.unlink()

    def _copied(self, store: Store, states: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
        """{name of a state in the store: the file that it is copied to, the order of its dimensions there}."""
        kept: dict[str, tuple[str, list[int]]] = {}
        for name in states:
            path = self.folder / f"{len(self.done):06d}-{name}.state"
            kept[name] = path.name, store.copy_to(name, path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        return kept

    def _write_journal(self) -> None:
        path = self.folder / _JOURNAL
        partial = path.with_suffix(".part")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"identity": self.source.identity, "done": self.done}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def take_states(self, sites: Sequence[str], store: Store) -> None:
        """Let the store have what an earlier process kept of the states after the block with these sites."""
        states = self.done["\n".join(sites)].get("states", {})
        assert isinstance(states, Mapping)
        for name, (file, order) in states.items():
            store.take(name, self.folder / file, order)

    def earlier(
        self, sites: Sequence[str], originals: dict[nn.Parameter, Tensor]
    ) -> tuple[list[CompensatedSite], Mapping[str, Any]] | None:
        """What an earlier process did in the block with these sites, whose weights are then refit; None if nothing.

        Its reports, and what was noted of layers that are wider.
        """
        entry = self.done.get("\n".join(sites))
        if entry is None:
            return None
        files = entry["files"]
        assert isinstance(files, Mapping)
        parameters = dict(self.source.model.named_parameters())
        for name, (file, shape) in files.items():
            parameter = parameters[name]
            originals.setdefault(parameter, parameter.data)
            view = self._resting(self.folder / file, parameter, shape)
            parameter.data = view if self.source.streams(parameter) else self.source.load(view)
        reports, wider = entry["sites"], entry["wider"]
        assert isinstance(reports, list)
        assert isinstance(wider, Mapping)
        return [CompensatedSite(**report) for report in reports], wider
