"""`attach_hardness_update` against a twin: the same optimizer stepping λ itself, with a gradient written out here."""

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

from hf_lambda_gelu import LambdaGELU, attach_hardness_update

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
FLOOR = 2.0**-24  # λ = 1 is held as this excess; in float64 it can be seen


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
@pytest.mark.parametrize(("dtype", "temperature", "rel"), [(torch.float64, 0.1, 1e-7), (torch.float32, 0.5, 2e-5)], ids=str)
def test_trajectory_is_the_twins(make: Make, start: float, dtype: torch.dtype, temperature: float, rel: float) -> None:
    """30 steps of the same optimizer class on λ itself, in float64, clipped at 1: λ is there after every step."""
    module = LambdaGELU(start, temperature).to(dtype)
    twin = twin_of(module)
    optimizer, reference = make([module.raw_hardness]), make([twin])
    attach_hardness_update(optimizer, [module])
    seen = []
    for step in range(30):
        x, weights = batch(step, dtype)
        twin.grad = by_hand(x, weights, twin.detach())
        optimizer.zero_grad()
        (module(x) * weights).sum().backward()
        optimizer.step()
        reference.step()
        twin.data.clamp_(min=1 + FLOOR)
        assert module.hardness.item() == pytest.approx(twin.item(), rel=rel)
        seen.append(twin.item())
    assert max(seen) - min(seen) > (1e-4 if start == 40.0 else 0.01)  # the run went somewhere


@pytest.mark.parametrize("start", [1.2, 1.6931, 5.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("name", "power"), [("SGD", 2), ("SGD, momentum", 2), ("Adam", 1), ("AdamW", 1), ("Adagrad", 1)])
def test_first_order_multipliers(name: str, power: int, start: float, temperature: float) -> None:
    """A small plain step on s, times (t/σ)² for SGD and t/σ for normalised optimizers, as method.md derives, is our step."""
    moved = []
    for hooked in (False, True):
        module = LambdaGELU(start, temperature).double()
        before = module.raw_hardness.item()
        optimizer = OPTIMIZERS[name]([module.raw_hardness])
        optimizer.param_groups[0]["lr"] = 1e-6
        if hooked:
            attach_hardness_update(optimizer, [module])
        x, weights = batch(0, torch.float64)
        (100 * module(x) * weights).sum().backward()  # far above Adam's eps
        optimizer.step()
        moved.append(module.raw_hardness.item() - before)
    sigma = 1 / (1 + math.exp(-before / temperature))
    assert moved[1] == pytest.approx(moved[0] * (temperature / sigma) ** power, rel=2e-3)


@each_optimizer
def test_never_below_one(make: Make) -> None:
    """Gradients that push λ down for good: it comes to rest at 1, to fp32's last bit, with an s that is finite."""
    module = LambdaGELU(1.02)
    optimizer = make([module.raw_hardness])
    attach_hardness_update(optimizer, [module])
    for _ in range(40):
        module.raw_hardness.grad = 50 * torch.autograd.grad(module.hardness, module.raw_hardness)[0]  # ∂L/∂λ = 50
        optimizer.step()
        assert 1.0 <= module.hardness.item() <= 1.02 + 1e-6
    assert module.hardness.item() == pytest.approx(1.0, abs=2e-7)
    assert torch.isfinite(module.raw_hardness).all()


@pytest.mark.parametrize(("name", "step"), [("SGD", 0.3 * 0.25), ("Adam", 0.05), ("RMSprop", 0.2), ("Adagrad", 0.2)])
def test_leaves_one_upward(name: str, step: float) -> None:
    """From λ = 1, ∂L/∂λ = −0.25 moves λ by the optimizer's textbook first step, where a plain step on s moves nothing."""
    reached = []
    for hooked in (False, True):
        module = LambdaGELU()
        optimizer = OPTIMIZERS[name]([module.raw_hardness])
        if hooked:
            attach_hardness_update(optimizer, [module])
        (-0.25 * module.hardness).backward()
        optimizer.step()
        reached.append(module.hardness.item())
    # Adam's eps is not small beside the vanishing gradient that the plain step sees
    assert reached[0] == pytest.approx(1.0, abs=1e-6)
    assert reached[1] == pytest.approx(1 + step, rel=1e-5)


@each_optimizer
def test_other_parameters_are_untouched(make: Make) -> None:
    """The same gradients with and without the hooks: the other parameters and their optimizer state agree to the bit."""
    runs = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), LambdaGELU(1.5), nn.Linear(5, 2), LambdaGELU(2.0))
        optimizer = make([*model[0].parameters(), *model[1].parameters(), *model[2].parameters()])
        optimizer.add_param_group({"params": [model[3].raw_hardness], "lr": 0.0})  # λ that is not ours to convert
        if hooked:
            attach_hardness_update(optimizer, [model[1]])
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        others = [p for name, p in model.named_parameters() if name != "1.raw_hardness"]
        states = [v for p in others for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        runs.append((model[1].raw_hardness.item(), [*others, *states, *(p.grad for p in others)]))
    assert runs[0][0] != runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("start", [1.0, 1.001, 1.6931, 21.5, 159.577, 1e4])
def test_idle_steps_do_not_move_hardness(start: float) -> None:
    """With no gradient, or one of exactly 0, going to λ and back a thousand times leaves λ where it was."""
    for gradient in (None, 0.0):
        module = LambdaGELU(start)
        optimizer = SGD([module.raw_hardness], lr=0.1)
        attach_hardness_update(optimizer, [module])
        before = module.hardness.item()
        module.raw_hardness.grad = None if gradient is None else torch.zeros(1)
        for _ in range(1000):
            optimizer.step()
        assert module.hardness.item() == pytest.approx(before, rel=2.5e-7)


def test_errors_name_the_remedy() -> None:
    """A forgotten parameter and a decayed one are refused before any hook is in place."""
    inside, outside = LambdaGELU(), LambdaGELU()
    optimizer = AdamW([inside.raw_hardness], weight_decay=0.01)
    for modules, message in (
        ([outside], r"in none of the optimizer's groups.*add_param_group"),
        ([inside], r"weight decay 0\.01.*weight_decay=0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_hardness_update(optimizer, modules)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@each_optimizer
def test_handles_remove(make: Make) -> None:
    """Attached and removed, an optimizer steps s to the bit as one that was never touched."""
    reached = []
    for touched in (False, True):
        module = LambdaGELU(1.5)
        optimizer = make([module.raw_hardness])
        if touched:
            for handle in attach_hardness_update(optimizer, (m for m in [module])):
                handle.remove()
        for _ in range(3):
            module.raw_hardness.grad = torch.tensor([-0.2])
            optimizer.step()
        reached.append(module.raw_hardness.item())
    assert reached[0] == reached[1]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_learning_rate_schedule(name: str) -> None:
    """torch's scheduler on a group of its own: the twin under the same schedule is where λ is."""
    module, other = LambdaGELU(1.3).double(), nn.Parameter(torch.ones(3))
    twin = twin_of(module)
    optimizer = OPTIMIZERS[name]([other])
    optimizer.add_param_group({"params": [module.raw_hardness], "lr": 0.04})
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
        twin.data.clamp_(min=1 + FLOOR)
        for scheduler in schedulers:
            scheduler.step()
        assert module.hardness.item() == pytest.approx(twin.item(), rel=1e-8)
    assert twin.item() != pytest.approx(1.3, abs=0.01)


@pytest.mark.parametrize("name", ["SGD", "AdamW, fused"])
def test_grad_scaler(name: str) -> None:
    """torch's GradScaler: an overflowed step leaves λ alone, and a scaled one moves it as the unscaled one of the twin."""
    module = LambdaGELU(1.5)
    twin = twin_of(module)
    optimizer, reference = OPTIMIZERS[name]([module.raw_hardness]), OPTIMIZERS[name]([twin])
    attach_hardness_update(optimizer, [module])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for slope in (-0.2, math.inf, -0.3, 0.1):
        optimizer.zero_grad()
        before = module.hardness.item()
        scaler.scale(module.hardness * slope).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isinf(slope):
            assert module.hardness.item() == pytest.approx(before, rel=2.5e-7)
            continue
        twin.grad = torch.full_like(twin, slope)
        reference.step()
        assert module.hardness.item() == pytest.approx(twin.item(), rel=2e-6)


@each_optimizer
def test_resume_gives_the_same_bits(make: Make) -> None:
    """Saved after 5 of 12 steps into new objects: s goes on to the bit as in the run that went through."""

    def run(module: LambdaGELU, optimizer: Optimizer, steps: range) -> list[float]:
        trace = []
        for step in steps:
            x, weights = batch(step, torch.float32)
            optimizer.zero_grad()
            (module(x) * weights).sum().backward()
            optimizer.step()
            trace.append(module.raw_hardness.item())
        return trace

    module = LambdaGELU(1.4)
    optimizer = make([module.raw_hardness])
    attach_hardness_update(optimizer, [module])
    run(module, optimizer, range(5))
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    through = run(module, optimizer, range(5, 12))

    file.seek(0)
    states = torch.load(file)
    resumed = LambdaGELU(9.0)
    again = make([resumed.raw_hardness])
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
    optimizer, reference = make([module.raw_hardness]), make([twin])
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
        optimizer = SGD([module.raw_hardness], lr=0.1)
        attach_hardness_update(optimizer, [module])
        if times == 2:
            attach_hardness_update(optimizer, [module])
        module.raw_hardness.grad = torch.ones(1)
        optimizer.step()
        reached.append(module.hardness.item())
    assert reached[0] == pytest.approx(reached[1], rel=1e-6)


def test_a_step_that_raises() -> None:
    """The next step goes from where the failed one left λ, as the twin's does; so does a λ that is set by hand."""
    module = LambdaGELU(5.0)
    optimizer = SGD([module.raw_hardness], lr=0.1)
    attach_hardness_update(optimizer, [module, module])

    def fails() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert module.hardness.item() == pytest.approx(5.0, rel=1e-6)
    module.raw_hardness.grad = torch.ones(1)
    optimizer.step()
    assert module.hardness.item() == pytest.approx(4.9, rel=1e-6)  # what the gradient is of is λ, as the failed step left it
    module.set_hardness(3.0)
    assert module.hardness.item() == pytest.approx(3.0, rel=1e-6)


def test_gradient_is_given_back() -> None:
    """Behind a step that moves nothing, the gradient is the one that backward left, with respect to s."""
    module = LambdaGELU(2.0)
    optimizer = SGD([module.raw_hardness], lr=0.0)
    attach_hardness_update(optimizer, [module])
    module(torch.randn(8)).sum().backward()
    before = module.raw_hardness.grad.clone()
    optimizer.step()
    torch.testing.assert_close(module.raw_hardness.grad, before)
