"""Optimizers that move parameters outside of a hooked step, average them or scale steps by them: λ against a plain twin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import tiny
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, Optimizer, RAdam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertForSequenceClassification

import hf_lambda_gelu as hlg

Make = Callable[[Iterable[Any]], Optimizer]


@pytest.fixture(autouse=True)
def accelerate_as_before() -> Iterator[None]:
    """Its state is one for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class SharpnessAware(Optimizer):
    """Foret et al. 2020: climbs first, takes the gradient there, steps from where it was. It never calls its own `step`."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = SGD(self.param_groups, lr=0.05)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def both(self, closure: Callable[[], Any]) -> None:
        with torch.enable_grad():
            closure()
        moved = [p for group in self.param_groups for p in group["params"]]
        kept = [p.clone() for p in moved]
        for p in moved:
            p.add_(p.grad * 0.05 / (p.grad.norm() + 1e-12))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, old in zip(moved, kept, strict=True):
            p.copy_(old)
        self.base.step()
        self.zero_grad()


class ScheduleFree(Optimizer):
    """Defazio et al. 2024, of SGD: trains at y, a mean of the fast z and the slow average x, which evaluation takes."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.count = 0

    @torch.no_grad()
    def both(self, closure: Callable[[], Any]) -> None:
        with torch.enable_grad():
            closure()
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            z, x = state.setdefault("z", p.clone()), state.setdefault("x", p.clone())
            z.sub_(0.1 * p.grad)
            x.lerp_(z, 1 / self.count)
            p.copy_(0.9 * x + 0.1 * z)
        self.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["x"])


def loss(hardness: Tensor) -> Tensor:
    return ((hardness - 3.0) ** 2).sum()


@pytest.mark.parametrize("make", [SharpnessAware, ScheduleFree])
@pytest.mark.parametrize("start", [1.1, 1.5, 20.0])  # no climb to below 1, which counts as 1
def test_moved_elsewhere(make: Make, start: float) -> None:
    """After 20 steps, and in evaluation, λ is where a parameter that is λ is."""
    gate, twin = hlg.LambdaGELU(start), nn.Parameter(torch.tensor([start]))
    ours: Any = make(hlg.parameter_groups(gate, 0.05))
    theirs: Any = make([twin])
    hlg.attach_hardness_update(ours, gate)
    for _ in range(20):
        ours.both(lambda: loss(gate.hardness).backward())
        theirs.both(lambda: loss(twin).backward())
        assert gate.hardness.item() == pytest.approx(twin.item(), rel=1e-6)
    if make is ScheduleFree:
        ours.evaluate()
        theirs.evaluate()
        assert gate.hardness.item() == pytest.approx(twin.item(), rel=1e-6)
    assert abs(twin.item() - start) > 0.5


OTHERS: dict[str, Make] = {
    "Adafactor": lambda p: Adafactor(p, lr=0.1),  # its step is relative to the parameter
    "NAdam": lambda p: NAdam(p, lr=0.1),
    "RAdam": lambda p: RAdam(p, lr=0.1),
    "in accelerate": lambda p: Accelerator(cpu=True).prepare(AdamW(p, lr=0.1, weight_decay=0.0)),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("goal", [0.0, 3.0])
def test_scaled_by_the_parameter(make: Make, goal: float) -> None:
    """A goal below 1 is clipped after each step, also where a wrapper holds the optimizer."""
    gate, twin = hlg.LambdaGELU(1.3), nn.Parameter(torch.tensor([1.3]))
    ours, theirs = make([gate.unclipped_hardness]), make([twin])
    hlg.attach_hardness_update(ours, gate)
    for _ in range(20):
        ((gate.hardness - goal) ** 2).sum().backward()
        ((twin - goal) ** 2).sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        twin.data.clamp_(min=1.0)
        assert gate.unclipped_hardness.item() == pytest.approx(twin.item(), rel=1e-6)
    assert gate.hardness.item() == 1.0 if goal == 0.0 else gate.hardness.item() > 1.4


def test_average_of_the_parameters() -> None:
    """torch's moving average of a model holds the moving average of λ, not that of another unit."""
    gate = hlg.LambdaGELU(1.0)
    averaged, expected = AveragedModel(gate, multi_avg_fn=get_ema_multi_avg_fn(0.9)), 1.0
    averaged.update_parameters(gate)  # the first is a copy
    for hardness in (40.0, 2.0, 7.0):
        gate.set_hardness(hardness)
        averaged.update_parameters(gate)
        expected = 0.9 * expected + 0.1 * hardness
    assert averaged.module.hardness.item() == pytest.approx(expected, rel=1e-6)


def test_saved_after_a_stop_within_the_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """λ on disk is λ in memory, wherever the step was stopped."""
    model = tiny.build("bert-classifier")
    hlg.convert(model, init_hardness=3.0)
    optimizer = Adam(hlg.parameter_groups(model), lr=0.01)
    hlg.attach_hardness_update(optimizer, model)
    model(**tiny.inputs(model)).logits.sum().backward()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert hlg.hardness_profile(loaded) == hlg.hardness_profile(model)
    assert set(hlg.hardness_profile(model).values()) == {3.0}
