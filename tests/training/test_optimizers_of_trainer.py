"""Optimizers that transformers' Trainer makes or is given: λ in them, beside a twin, or the refusal by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SITES, Rows, arguments, converted, trainer_of
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training import averaging, optimizer
from hf_lambda_gelu.training.run_checks import check_gradient
from scripts.matrix import comparison, twin
from scripts.matrix.cells import Cell
from scripts.matrix.composite import MuonAndAdamW, MuonFactory, SharpnessAware
from scripts.matrix.optimizers import CELLS, measure

LOW_RANK = {"optim_target_modules": ["query"], "optim_args": "rank=4", "weight_decay": 0.1}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


def cell(name: str, trainer: str, precision: str = "fp32") -> Cell:
    found = Cell(name, precision, "one process", trainer)
    assert found in CELLS
    return found


@pytest.mark.parametrize(
    "cell",
    [
        cell("schedule_free_adamw", "Trainer"),
        pytest.param(cell("optimizer_cls_and_kwargs: a factory of Muon + AdamW", "Trainer"), marks=needs_muon),
        cell("adamw_torch_fused", "Trainer", "pure bf16"),
        cell("schedule-free SGD", "own loop"),
        cell("schedule-free wrapper of SGD", "own loop"),
        cell("SAM of SGD", "own loop"),
    ],
    ids=lambda cell: f"{cell.optimizer}, {cell.precision}, {cell.trainer}",
)
def test_equal_to_the_twin(cell: Cell) -> None:
    """A few cells of the matrix, which `make matrix` has whole, with optimizers that need bitsandbytes too."""
    found = measure(cell)
    assert found.verdict == "equal", found


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    """Before the optimizer hangs itself on the parameters, so that the model can be trained otherwise."""
    model = converted()
    options = LOW_RANK | {"hardness_switch_point": 0.9}
    with pytest.raises(ValueError, match=f"optim='{name}' steps each parameter within backward.*take an optimizer"):
        trainer_of(model, tmp_path, optim=name, **options).train()
    assert all(not p._backward_hooks and not getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


@pytest.mark.parametrize("what", ["clip", "own_group"])
def test_a_cell_can_be_off(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the clipping, or with the model's rate for λ, the figure says so."""
    if what == "clip":
        monkeypatch.setattr(optimizer, "clip", lambda *_: None)
    else:
        monkeypatch.setattr("hf_lambda_gelu.training.trainer.own_group", lambda *_: None)
    monkeypatch.setattr(comparison, "BOUND", 1e-3)
    found = measure(cell("adamw_torch", "Trainer"))
    assert found.verdict == "off"
    assert found.figure is not None
    assert found.figure > 1e-2


def low_rank(model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Groups as transformers makes them for GaLore and APOLLO: all parameters, whether they want a gradient or not."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": others}, {"params": matrices, "rank": 4, "scale": 0.25}]
    return torch.optim.AdamW, {"params": groups, "lr": 1e-3}


@pytest.mark.parametrize("optim", ["low rank", "adafactor", "schedule_free_sgd", "rmsprop"])
def test_groups(tmp_path: Path, optim: str) -> None:
    """Each parameter is in one group; λ alone in one with its own rate, without decay and without a projection."""
    model = converted()
    trainer = trainer_of(model, tmp_path, hardness_learning_rate=0.03, **({} if optim == "low rank" else {"optim": optim}))
    trainer.optimizer_cls_and_kwargs = low_rank(model) if optim == "low rank" else None
    groups = trainer.create_optimizer().param_groups
    assert Counter(id(p) for group in groups for p in group["params"]) == Counter(id(p) for p in model.parameters())
    assert {id(p) for p in groups[-1]["params"]} == {id(model.get_submodule(site).unclipped_hardness) for site in SITES}
    assert (groups[-1]["lr"], groups[-1]["weight_decay"]) == (0.03, 0.0)
    assert "rank" not in groups[-1]
    assert any("rank" in group for group in groups) == (optim == "low rank")


@needs_muon
def test_two_in_one_under_a_schedule(tmp_path: Path) -> None:
    """λ is stepped by the one that stepped its group, at its own rate, which the schedule of the outer one reaches."""
    model = converted(hardness=1.5)
    trainer = hlg.LambdaGELUTrainer(
        model,
        arguments(tmp_path, max_steps=4, hardness_learning_rate=0.04, hardness_switch_point=1.0, hardness_hold=0.0),
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 1e-3}),
    )
    trainer.train()
    outer = trainer.optimizer.optimizer
    assert isinstance(outer, MuonAndAdamW)
    (group,) = (
        g for g in outer.both[1].param_groups if any(p is model.get_submodule(SITES[0]).raw_hardness for p in g["params"])
    )
    assert any(group is other for other in outer.param_groups)
    assert (group["initial_lr"], group["lr"]) == (0.04, 0.0)


class Outside(SharpnessAware):
    """Has groups of its own, which the optimizer inside does not know."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups = list(self.param_groups)


def test_only_in_the_outer_one() -> None:
    """A group that is added to what steps nothing by itself: refused, as λ would not move."""
    model = nn.Sequential(nn.Linear(2, 4), hlg.LambdaGELU())
    wrapped = Outside(model[0].parameters())
    wrapped.add_param_group({"params": [model[1].unclipped_hardness]})
    with pytest.raises(ValueError, match=r"in the groups of Outside, but in none of the optimizers that it steps \(SGD\)"):
        hlg.attach_hardness_update(wrapped, model)
    assert not wrapped.base_optimizer._optimizer_step_post_hooks


class Bare(SGD):
    """Does not call torch's `__init__`, which makes what hooks go into."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters, "lr": 0.1}]


def test_without_hooks() -> None:
    gate = hlg.LambdaGELU()
    with pytest.raises(ValueError, match=r"Bare has no step hooks of torch.*call super\(\).__init__"):
        hlg.attach_hardness_update(Bare([gate.unclipped_hardness]), gate)


def test_clipped_by_the_one_that_steps() -> None:
    """SAM that calls the inner optimizer's step and never its own; removed, nothing clips any more."""
    gate = hlg.LambdaGELU(1.01)
    outer = SharpnessAware([gate.unclipped_hardness], lr=1.0)
    handle = hlg.attach_hardness_update(outer, gate)
    gate.unclipped_hardness.grad = torch.ones(1)
    outer.base_optimizer.step()
    assert gate.unclipped_hardness.item() == 1.0
    handle.remove()
    outer.base_optimizer.step()
    assert gate.unclipped_hardness.item() == 0.0


class MatricesAlone(SGD):
    """Passes over all else, as short forms of Muon do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 2 and parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    ("kind", "start", "push", "said"),
    [
        (MatricesAlone, 1.5, 1.0, True),
        (MatricesAlone, 1.0, -1.0, True),
        (MatricesAlone, 1.0, 1.0, False),  # it would be clipped: nobody can tell
        (MatricesAlone, 1.5, 1e-7, False),  # a step that rounds to nothing
        (SGD, 1.5, 1.0, False),
        (SGD, 1.0, 1.0, False),
    ],
)
def test_passed_over(kind: Any, start: float, push: float, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer that has λ in its groups and does not step it: said once, where it can be known."""
    gate = hlg.LambdaGELU(start)
    made = kind([gate.unclipped_hardness], lr=0.01)
    hlg.attach_hardness_update(made, gate)
    for _ in range(30):
        gate.unclipped_hardness.grad = torch.tensor([push])
        made.step()
    assert caplog.text.count(f"{kind.__name__} has not moved 1 λ in 10 steps") == said


class Consumed(hlg.LambdaGELUTrainer):
    """Steps each parameter within backward and leaves no gradient, as layer-wise optimizers do."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        def step(parameter: nn.Parameter) -> None:
            parameter.grad = None

        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        self.optimizer = SGD(hlg.parameter_groups(self.model), lr=0.1)
        return self.optimizer


def test_gradients_that_are_used_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no parameter has a gradient when SGD is to step.*freeze λ"):
        Consumed(converted(), arguments(tmp_path), train_dataset=Rows()).train()


def test_a_first_batch_that_does_not_reach_a_site() -> None:
    """Of two towers say: that λ has no gradient yet is no reason to stop."""
    model = nn.ModuleList([nn.Linear(2, 2), hlg.LambdaGELU()])
    made = SGD(hlg.parameter_groups(model), lr=0.1)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        check_gradient(made, model)
    model[0].weight.grad = torch.zeros(2, 2)
    check_gradient(made, model)


@pytest.mark.parametrize("apart", [True, False])
def test_a_rate_that_is_not_its_own(tmp_path: Path, apart: bool, caplog: pytest.LogCaptureFixture) -> None:
    """λ among the other parameters has the model's rate: said, since hardness_learning_rate is not used."""
    model = converted()
    groups = hlg.parameter_groups(model) if apart else model.parameters()
    made = AdamW(groups, lr=2e-4, weight_decay=0.0)
    args = arguments(tmp_path, max_steps=2, warmup_steps=1)
    hlg.LambdaGELUTrainer(model, args, train_dataset=Rows(), optimizers=(made, None)).train()
    assert ("has their learning rate, 0.0002, in units of λ per step" in caplog.text) != apart


def test_points_of_other_optimizers_are_not_taken_for_averages() -> None:
    """A state that is named z and is none: only optimizers with train() and eval() have two points."""
    gate = hlg.LambdaGELU(1.5)
    plain = SGD([gate.unclipped_hardness], lr=0.1)
    plain.state[gate.unclipped_hardness]["z"] = torch.tensor([0.5])
    hlg.attach_hardness_update(plain, gate)
    gate.unclipped_hardness.grad = torch.ones(1)
    plain.step()
    averaging.go_on_from(plain)
    assert plain.state[gate.unclipped_hardness]["z"].item() == 0.5
    assert gate.unclipped_hardness.item() == pytest.approx(1.4)


def test_the_twin_is_not_ours() -> None:
    """It has no module of the package, and one λ for each."""
    model, hardness = twin.twin()
    assert not hlg.hardness_sites(model)
    assert [p.item() for p in hardness] == pytest.approx(list(hlg.hardness_profile(twin.ours()).values()))
