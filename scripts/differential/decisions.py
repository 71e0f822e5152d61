"""What the engine decided, site after site, without how it came to it: the only place that looks into the package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.ridge import solve

RIDGE = 0.1


@dataclass
class Map:
    """A linear map and what was decided for it.

    Attributes:
        weight, bias: names of the parameters.
        index: which expert of a stack; None otherwise.
        transposed: whether the weight is (d, k).
        outputs: which of the weight's outputs, of a convolution in groups.
        group, groups: of it.
        gain: what a constant in the output is in the bias, where that is a norm's; None for 1.
        method, ridge: of the correction.
        rows: how many rows the engine counted.
        solved: (ΔW, c) of least squares with `RIDGE`, from the same sums, whatever was chosen.
    """

    weight: str
    bias: str | None
    index: int | None
    transposed: bool
    outputs: slice = field(default_factory=lambda: slice(None))
    group: int = 0
    groups: int = 1
    gain: Tensor | None = None
    method: str = "none"
    ridge: float | None = None
    rows: int = 0
    solved: tuple[Tensor, Tensor] | None = None


@dataclass
class Decision:
    """Of one site.

    Attributes:
        site: its name.
        hard: the sites that were ReLU by then.
        maps: those after the site.
        block: the module that the target is in; "" is the model.
        pooled: whether the target is on the smooth network's own states.
        module, moved, scale: where the stream is (None: the block's output), whether its channels are in dimension 1, and by
            what the map's output is scaled; `scale` is None where the target is local.
    """

    site: str
    hard: set[str]
    maps: list[Map]
    block: str = ""
    pooled: bool = False
    module: str | None = None
    moved: bool = False
    scale: Tensor | None = None
    _decided: list[Any] = field(default_factory=list)
    _solved: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def recorded() -> Iterator[list[Decision]]:
    """Within the block, refits leave their decisions in the list, in the order of the sites."""
    made: list[Decision] = []
    refit, evidence, decide = engine.Refit._refit, engine.Refit._evidence, engine.decide
    current: list[Decision] = []

    def _refit(self: Any, walk: Any, site: str, maps: Any, method: Any) -> Any:
        model = self.networks.model
        names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
        found = [
            Map(
                m.name,
                None if m.bias is None else names[id(m.bias)],
                m.index,
                m.transposed,
                m.outputs,
                m.group,
                m.groups,
                m.gain,
            )
            for m in maps
        ]
        current[:] = [Decision(site, set(self.networks.hard), found, _name(model, walk.block))]
        result = refit(self, walk, site, maps, method)
        (decision,) = current
        for linear, (correction, verdict) in zip(decision.maps, decision._decided, strict=True):
            linear.method, linear.ridge, linear.rows = correction.method, correction.ridge, verdict.rows
        for linear, solved in zip(decision.maps, decision._solved, strict=True):
            linear.solved = solved
        made.append(decision)
        return result

    def _evidence(self: Any, walk: Any, site: str, maps: Any) -> Any:
        result = evidence(self, walk, site, maps)
        (decision,) = current
        decision.pooled = bool(getattr(walk, "pooled", walk.chain.pooled))
        meeting = result.meeting
        if meeting is not None:
            decision.module, decision.moved = meeting.module, meeting.moved
            decision.scale = meeting.scale.detach().double().cpu()
        return result

    def _decide(fit: Any, held_out: Any, *args: Any, **kwargs: Any) -> Any:
        result = decide(fit, held_out, *args, **kwargs)
        solved = solve(fit + held_out, "least_squares", biased=kwargs["biased"], ridge=RIDGE)
        current[0]._solved.append((solved.weight.cpu(), solved.bias.cpu()) if fit.count + held_out.count else None)
        current[0]._decided.append(result)
        return result

    engine.Refit._refit, engine.Refit._evidence, engine.decide = _refit, _evidence, _decide  # type: ignore[method-assign]
    try:
        yield made
    finally:
        engine.Refit._refit, engine.Refit._evidence, engine.decide = refit, evidence, decide  # type: ignore[method-assign]


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)
