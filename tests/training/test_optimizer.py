"""λ under optimizers against a twin: the same optimizer stepping λ itself, with a gradient written out here."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from hf_lambda_gelu import LambdaGELU, attach_hardness_update, parameter_groups

Make = Callable[[Iterable[Any]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.3),
    "SGD, momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.05),
    "AdamW": lambda p: AdamW(p, lr=0.05, weight_decay=0.0),
    "AdamW, fused": lambda p: AdamW(p, lr=0.05, weight_decay=0.0, fused=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.02, momentum=0.5),
    "Adagrad": lambda p: Adagrad(p, lr=0.2),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pre-activations that reach the bend at the λ of these tests, and weights whose mean changes sign now and then."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, generator=generator, dtype=torch.float64) / (1 + step % 3)
    return x.to(dtype), (torch.rand(64, generator=generator, dtype=torch.float64) - (0.8, 0.3, 0.7)[step % 3]).to(dtype)


def by_hand(x: Tensor, weights: Tensor, hardness: Tensor) -> Tensor:
    """∂/∂λ of Σ w x Φ(λx) = Σ w x² φ(λx)."""
    x, weights = x.double(), weights.double()
    return (weights * x**2 * torch.exp(-((hardness * x) ** 2) / 2)).sum().reshape(1) / math.sqrt(2 * math.pi)


def twin_of(module: LambdaGELU) -> Tensor:
    return module.hardness.detach().double().clone().requires_grad_()


@each_optimizer
@pytest.mark.parametrize("start", [1.0, 1.05, 1.6931, 40.0])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_trajectory_is_the_twins(make: Make, start: float, dtype: torch.dtype, rel: float) -> None:
    """30 steps of the same optimizer class on λ itself, in float64, clipped at 1: λ is there after every step."""
    module = LambdaGELU(start).to(dtype)
    twin = twin_of(module)
    optimizer, reference = make([module.unclipped_hardness]), make([twin])
    attach_hardness_update(optimizer, [module])
    seen = []
    for step in range(30):
        x, weights = batch(step, dtype)
        twin.grad = by_hand(x, weights, twin.detach())
        optimizer.zero_grad()
        (module(x) * weights).sum().backward()
        optimizer.step()
        reference.step()
        twin.data.clamp_(min=1.0)
        assert module.hardness.item() == pytest.approx(twin.item(), rel=rel)
        seen.append(twin.item())
    assert max(seen) - min(seen) > (1e-4 if start == 40.0 else 0.01)  # the run went somewhere


@each_optimizer
def test_never_below_one(make: Make) -> None:
    """Gradients that push λ down for good: it comes to rest at exactly 1, and so does the parameter."""
    module = LambdaGELU(1.02)
    optimizer = make([module.unclipped_hardness])
    attach_hardness_update(optimizer, [module])
    for _ in range(40):
        module.unclipped_hardness.grad = (
            50 * torch.autograd.grad(module.hardness, module.unclipped_hardness)[0]
        )  # ∂L/∂λ = 50
        optimizer.step()
        assert 1.0 <= module.unclipped_hardness.item() <= 1.02 + 1e-6
    assert module.hardness.item() == 1.0


@pytest.mark.parametrize(("name", "step"), [("SGD", 0.3 * 0.25), ("Adam", 0.05), ("RMSprop", 0.2), ("Adagrad", 0.2)])
def test_leaves_one_upward(name: str, step: float) -> None:
    """From λ = 1, ∂L/∂λ = −0.25 moves λ by the optimizer's textbook first step; from below 1, the parameter."""
    for start in (1.0, 1.0 - 0.5 * step):
        module = LambdaGELU()
        module.unclipped_hardness.data.fill_(start)
        optimizer = OPTIMIZERS[name]([module.unclipped_hardness])
        (-0.25 * module.hardness).backward()
        optimizer.step()
        assert module.hardness.item() == pytest.approx(start + step, rel=1e-5)


@each_optimizer
def test_other_parameters_are_untouched(make: Make) -> None:
    """The same gradients with and without: all parameters, gradients and the optimizer's state agree to the bit."""
    runs = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), LambdaGELU(1.5), nn.Linear(5, 2), LambdaGELU(2.0))
        optimizer = make(model.parameters())
        if hooked:
            attach_hardness_update(optimizer, [model[1]])
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            if not hooked:
                model[1].unclipped_hardness.data.clamp_(min=1.0)
        others = list(model.parameters())
        states = [v for p in others for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        runs.append([*others, *states, *(p.grad for p in others)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("start", [1.0, 1.001, 1.6931, 21.5, 159.577, 1e4])
def test_idle_steps_do_not_move_hardness(start: float) -> None:
    """With no gradient, or one of exactly 0, a thousand steps leave λ where it was, to the bit."""
    for gradient in (None, 0.0):
        module = LambdaGELU(start)
        optimizer = SGD([module.unclipped_hardness], lr=0.1)
        attach_hardness_update(optimizer, [module])
        before = module.hardness.item()
        module.unclipped_hardness.grad = None if gradient is None else torch.zeros(1)
        for _ in range(1000):
            optimizer.step()
        assert module.hardness.item() == before


def test_errors_name_the_remedy() -> None:
    """A forgotten parameter and a decayed one are refused before any hook is in place."""
    inside, outside = LambdaGELU(), LambdaGELU()
    optimizer = AdamW([inside.unclipped_hardness], weight_decay=0.01)
    for modules, message in (
        ([outside], r"in none of the optimizer's groups.*add_param_group"),
        ([inside], r"weight decay 0\.01.*weight_decay=0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_hardness_update(optimizer, modules)
    assert not optimizer._optimizer_step_post_hooks
    outside.requires_grad_(False)
    for nothing in ([outside], nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no λ to train"):
            attach_hardness_update(optimizer, nothing)
    with pytest.raises(ValueError, match="Linear has no λ-GELU: call convert"):
        parameter_groups(nn.Linear(2, 2))


@each_optimizer
def test_handle_removes(make: Make) -> None:
    """Attached and removed: nothing clips any more."""
    module = LambdaGELU(1.001)
    optimizer = make([module.unclipped_hardness])
    attach_hardness_update(optimizer, (m for m in [module])).remove()
    for _ in range(3):
        module.unclipped_hardness.grad = torch.tensor([2.0])
        optimizer.step()
    assert module.unclipped_hardness.item() < 1.0
    assert module.hardness.item() == 1.0


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_learning_rate_schedule(name: str) -> None:
    """torch's scheduler on a group of its own: the twin under the same schedule is where λ is."""
    module, other = LambdaGELU(1.3).double(), nn.Parameter(torch.ones(3))
    twin = twin_of(module)
    optimizer = OPTIMIZERS[name]([other])
    optimizer.add_param_group({"params": [module.unclipped_hardness], "lr": 0.04})
    reference = OPTIMIZERS[name]([{"params": [twin], "lr": 0.04}])
    attach_hardness_update(optimizer, [module])
    schedulers = [LambdaLR(o, lambda step: (1 + step) / 4 if step < 4 else 3 / step) for o in (optimizer, reference)]
    for step in range(20):
        x, weights = batch(step, torch.float64)
        twin.grad = by_hand(x, weights, twin.detach())
        optimizer.zero_grad()
        (module(x) * weights).sum().backward()
        optimizer.step()
        reference.step()
        twin.data.clamp_(min=1.0)
        for scheduler in schedulers:
            scheduler.step()
        assert module.hardness.item() == pytest.approx(twin.item(), rel=1e-12)
    assert twin.item() != pytest.approx(1.3, abs=0.01)


@pytest.mark.parametrize("name", ["SGD", "AdamW, fused"])
def test_grad_scaler(name: str) -> None:
    """torch's GradScaler: an overflowed step leaves λ alone, and a scaled one moves it as the unscaled one of the twin."""
    module = LambdaGELU(1.5)
    twin = twin_of(module)
    optimizer, reference = OPTIMIZERS[name]([module.unclipped_hardness]), OPTIMIZERS[name]([twin])
    attach_hardness_update(optimizer, [module])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for slope in (-0.2, math.inf, -0.3, 0.1):
        optimizer.zero_grad()
        before = module.hardness.item()
        scaler.scale(module.hardness * slope).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isinf(slope):
            assert module.hardness.item() == before
            continue
        twin.grad = torch.full_like(twin, slope)
        reference.step()
        assert module.hardness.item() == pytest.approx(twin.item(), rel=2e-6)


@each_optimizer
def test_resume_gives_the_same_bits(make: Make) -> None:
    """Saved after 5 of 12 steps into new objects: λ goes on to the bit as in the run that went through."""

    def run(module: LambdaGELU, optimizer: Optimizer, steps: range) -> list[float]:
        trace = []
        for step in steps:
            x, weights = batch(step, torch.float32)
            optimizer.zero_grad()
            (module(x) * weights).sum().backward()
            optimizer.step()
            trace.append(module.unclipped_hardness.item())
        return trace

    module = LambdaGELU(1.4)
    optimizer = make([module.unclipped_hardness])
    attach_hardness_update(optimizer, [module])
    run(module, optimizer, range(5))
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    through = run(module, optimizer, range(5, 12))

    file.seek(0)
    states = torch.load(file)
    resumed = LambdaGELU(9.0)
    again = make([resumed.unclipped_hardness])
    attach_hardness_update(again, [resumed])
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert run(resumed, again, range(5, 12)) == through
    assert len(set(through)) == 7


@pytest.mark.parametrize(
    "make",
    [OPTIMIZERS["SGD"], lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)],
    ids=["SGD", "LBFGS"],
)
def test_closure(make: Make) -> None:
    """`step(closure)`, which torch documents for every optimizer and LBFGS needs: the twin's closure sees λ itself."""
    module = LambdaGELU(1.5).double()
    twin = twin_of(module)
    optimizer, reference = make([module.unclipped_hardness]), make([twin])
    attach_hardness_update(optimizer, [module])
    x, weights = batch(0, torch.float64)  # λ rises: the twin knows no floor

    def ours() -> Tensor:
        optimizer.zero_grad()
        loss = (module(x) * weights).sum()
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        twin.grad = by_hand(x, weights, twin.detach())
        return (x * torch.special.ndtr(twin.detach() * x) * weights).sum()

    for _ in range(3):
        assert float(optimizer.step(ours)) == pytest.approx(float(reference.step(theirs)), rel=1e-6)
    assert module.hardness.item() == pytest.approx(twin.item(), rel=1e-6)


def test_attached_twice() -> None:
    """By a user and again by the Trainer, say: twice is once, so that λ makes the same step."""
    reached = []
    for times in (1, 2):
        module = LambdaGELU(2.0)
        optimizer = SGD([module.unclipped_hardness], lr=0.1)
        attach_hardness_update(optimizer, [module])
        if times == 2:
            attach_hardness_update(optimizer, [module])
        module.unclipped_hardness.grad = torch.ones(1)
        optimizer.step()
        reached.append(module.hardness.item())
    assert reached[0] == pytest.approx(reached[1], rel=1e-6)


def test_a_step_that_raises() -> None:
    """λ is what it was; the next step goes on from there, as from a λ that is set by hand."""
    module = LambdaGELU(5.0)
    optimizer = SGD([module.unclipped_hardness], lr=0.1)
    attach_hardness_update(optimizer, [module, module])

    def fails() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert module.hardness.item() == pytest.approx(5.0, rel=1e-6)
    module.unclipped_hardness.grad = torch.ones(1)
    optimizer.step()
    assert module.hardness.item() == pytest.approx(4.9, rel=1e-6)  # what the gradient is of is λ, as the failed step left it
    module.set_hardness(3.0)
    assert module.hardness.item() == pytest.approx(3.0, rel=1e-6)
