"""Weights of which every process has a part, by FSDP2's `fully_shard`, and that are whole only while their block runs.

While the source is attached, FSDP2's hooks are off and each of its parameters has a plain one in its place. A block is what
`fully_shard` was called on, the outermost such module but for the model: FSDP2 itself brings its weights together for its
forward, and no other module uses them. What the model alone has (FSDP2's root: embeddings, head) is whole all the time, as
it is in FSDP2's forward. What stands in for a weight is NaN, so that nothing can be computed of it in silence.

Processes run blocks at different times, and gathering takes all of them: so weights are asked for, see `ask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import without_torch_function
from .block_source import BlockSource
from .sharding import fsdp2_blocks, reshard

# a parameter's name, and how often it had been refit
Version = tuple[str, int]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class ShardSource(BlockSource):
    """Brings the weights of a model's blocks together, for the time in which they run.

    Args:
        ask: called with the versions of weights that this process wants; lets all processes call `answer` with what they
            want together. None where there is one process.
    """

    def __init__(self, model: nn.Module, ask: Callable[[frozenset[Version]], None] | None) -> None:
        self._cut: dict[nn.Parameter, Any] = {}  # what stands in for it → FSDP2's parameter, a DTensor
        self._places: list[tuple[nn.Module, str, Any]] = []  # where it belongs
        self._names: dict[nn.Parameter, str] = {}
        self._resting: dict[int, tuple[Tensor, Version]] = {}  # by address
        self._parts: dict[Version, tuple[Tensor, Any]] = {}  # with FSDP2's parameter
        self._hooks: list[tuple[dict[int, Any], list[tuple[int, Any]]]] = []
        self._wanted: frozenset[Version] = frozenset()
        self._brought: dict[Version, Tensor] = {}
        self._ask = self.answer if ask is None else ask
        found: Any = next(p for p in model.parameters() if hasattr(p, "full_tensor"))
        kind: str = found.device_mesh.device_type
        here = torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
        super().__init__(model, here)

    # ------------------------------------------------------------------------------------------------- what rests

    def rests(self, data: Tensor) -> bool:
        """Whether this stands in for a weight."""
        return data.numel() > 0 and data.data_ptr() in self._resting

    def is_cut(self, parameter: nn.Parameter) -> bool:
        """Whether this process has a part of the parameter, and not all of it."""
        return parameter in self._cut

    def cut(self, parameter: nn.Parameter) -> Tensor:
        """Keep this process's part of a parameter that was refit; what stands in for the whole from now on."""
        version = self._names[parameter], sum(name == self._names[parameter] for name, _ in self._parts)
        return self._rest(parameter, version, self._part_of(parameter, parameter.data).clone())

    def part(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of what the parameter is now."""
        if self.rests(parameter.data):
            return self._parts[self._resting[parameter.data.data_ptr()][1]][0]
        return self._part_of(parameter, parameter.data)

    def memory(self, parameter: nn.Parameter) -> Tensor:
        """Where FSDP2 keeps this process's part."""
        local: Tensor = self._cut[parameter].detach().to_local()
        return local

    def _part_of(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        original = self._cut[parameter]
        dim: int = original.placements[0].dim
        chunks = whole.chunk(original.device_mesh.size(), dim)
        rank: int = original.device_mesh.get_local_rank()
        return chunks[rank] if rank < len(chunks) else whole.narrow(dim, 0, 0)

    def _rest(self, parameter: nn.Parameter, version: Version, part: Tensor) -> Tensor:
        nothing = torch.nan if parameter.is_floating_point() else 0
        stand_in = torch.full((1,), nothing, dtype=parameter.dtype, device=self.device).expand(self._cut[parameter].shape)
        self._resting[stand_in.data_ptr()] = stand_in, version
        self._parts[version] = part, self._cut[parameter]
        return stand_in

    # ------------------------------------------------------------------------------------------ what is brought together

    def load_all(self, resting: Sequence[Tensor]) -> list[Tensor]:
        """What rests, whole: all processes give their parts."""
        versions = [self._resting[tensor.data_ptr()][1] for tensor in resting]
        self._wanted = frozenset(versions)
        if versions:
            self._ask(self._wanted)
        brought, self._brought = self._brought, {}
        return [brought[version] for version in versions]

    @torch.no_grad()
    def answer(self, asked: Iterable[Version]) -> None:
        """Bring these weights together, and keep those that this process wants; every process does so with the same ones."""
        with without_torch_function():
            for version in sorted(asked):
                whole = self._gathered(*self._parts[version])
                if version in self._wanted:
                    self._brought[version] = whole
        self._wanted = frozenset()

    def _gathered(self, part: Tensor, original: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        mesh, placements, shape = original.device_mesh, original.placements, original.shape
        cut = DTensor.from_local(
            part.to(self.device), mesh, placements, run_check=False, shape=shape, stride=original.stride()
        )
        whole = cut.full_tensor()
        return whole.clone() if whole.data_ptr() == part.data_ptr() else whole

    # ---------------------------------------------------------------------------------------------------- the model

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model runs without FSDP2; afterwards it is FSDP2's again, as of its parameters' memory."""
        try:
            with super().attached():
                yield
        finally:
            self._put_back()

    def prepare(self) -> None:
        """Put plain parameters in the places of FSDP2's; what no block has is brought together for good, and so is λ."""
        reshard(self.model)
        blocks = fsdp2_blocks(self.model)
        self._take_hooks_off(blocks)
        made: dict[int, nn.Parameter] = {}
        for prefix, module in self.model.named_modules():
            for leaf, original in list(module._parameters.items()):
                if original is None or not hasattr(original, "full_tensor"):
                    continue
                if id(original) not in made:
                    made[id(original)] = self._stand_in(original, f"{prefix}.{leaf}")
                self._places.append((module, leaf, original))
                module._parameters[leaf] = made[id(original)]
        self.blocks = {block: list(block.parameters()) for block in blocks}
        inside = {p for weights in self.blocks.values() for p in weights if p.numel() > 1}
        outside = [p for p in self._cut if p not in inside]
        for parameter, whole in zip(outside, self.load_all([p.data for p in outside]), strict=True):
            parameter.data = whole

    def _stand_in(self, original: Any, name: str) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(0, dtype=original.dtype, device=self.device), original.requires_grad)
        self._cut[parameter], self._names[parameter] = original, name
        parameter.data = self._rest(parameter, (name, 0), self.memory(parameter))
        return parameter

    def _take_hooks_off(self, blocks: Sequence[nn.Module]) -> None:
        """FSDP2's own, which would gather at times of their own."""
        found: set[nn.Module] = set()
        for module in self.model.modules():
            for hooks in (getattr(module, kind) for kind in _HOOKS):
                own = [key for key, hook in hooks.items() if _is_of_fsdp2(hook)]
                if own:
                    found.add(module)
                    self._hooks.append((hooks, list(hooks.items())))
                for key in own:
                    del hooks[key]
        if not found.issuperset(blocks):
            raise RuntimeError("FSDP2's hooks are not found: this version of torch has them elsewhere")

    def _put_back(self) -> None:
        for module, leaf, original in self._places:
            module._parameters[leaf] = original
        for hooks, before in self._hooks:
            hooks.clear()
            hooks.update(before)


def _is_of_fsdp2(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")
