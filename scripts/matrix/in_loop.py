"""Optimizers in loops of one's own, with `parameter_groups` and `attach_hardness_update`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

import hf_lambda_gelu as hlg
from scripts.matrix.cells import Cell, Outcome
from scripts.matrix.comparison import RATE, Make, Profile, Refusal, Run, compared, dtype_of, parameters_of, refused
from scripts.matrix.composite import MuonAndAdamW, SharpnessAware
from scripts.matrix.twin import BATCH, STEPS, Rows, clip, ours, twin, twin_groups


def _of(module: str, name: str, **options: Any) -> Make:
    """An optimizer of a library that is imported when it is wanted."""
    return lambda model, groups: getattr(import_module(module), name)(groups, **options)


def _of_torch(name: str, **options: Any) -> Make:
    return _of("torch.optim", name, **options)


def _low_rank(module: str, name: str, **options: Any) -> Make:
    def make(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
        matrices = {id(p) for key, p in model.named_parameters() if ".self." in key and p.ndim == 2}
        first, *rest = groups
        apart = {"params": [p for p in first["params"] if id(p) in matrices], "rank": 4, "update_proj_gap": 10, **options}
        others = {**first, "params": [p for p in first["params"] if id(p) not in matrices]}
        return _of(module, name, lr=1e-3)(model, [others, *rest, apart])

    return make


def _in_accelerate(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
    return Accelerator(cpu=True).prepare(torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0))


def _two(model: nn.Module, groups: list[dict[str, Any]]) -> list[Optimizer]:
    return MuonAndAdamW(groups, lr=1e-3).both


def _schedule_free_wrapper(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
    return _of("schedulefree", "ScheduleFreeWrapper")(model, torch.optim.SGD(groups, lr=0.01))


def _of_model(name: str) -> Make:
    return lambda model, groups: _of("lomo_optim", name)(model, model)  # type: ignore[arg-type]


LOOPS: dict[str, Make] = {
    "AdamW": _of_torch("AdamW", lr=1e-3),
    "AdamW, fused": _of_torch("AdamW", lr=1e-3, fused=True),
    "Adam": _of_torch("Adam", lr=1e-3),
    "SGD, momentum": _of_torch("SGD", lr=0.01, momentum=0.9),
    "Adafactor (torch)": _of_torch("Adafactor", lr=1e-3),
    "Adafactor (transformers)": _of("transformers.optimization", "Adafactor", lr=1e-3, relative_step=False),
    "RMSprop": _of_torch("RMSprop", lr=1e-3),
    "NAdam": _of_torch("NAdam", lr=1e-3),
    "RAdam": _of_torch("RAdam", lr=1e-3),
    "Adagrad": _of_torch("Adagrad", lr=1e-3),
    "Adadelta": _of_torch("Adadelta", lr=0.1),
    "Adamax": _of_torch("Adamax", lr=1e-3),
    "ASGD": _of_torch("ASGD", lr=0.01),
    "Rprop": _of_torch("Rprop", lr=1e-3),
    "Lion": _of("lion_pytorch", "Lion", lr=1e-3),
    "AdamW, 8 bit (bitsandbytes)": _of("bitsandbytes.optim", "AdamW8bit", lr=1e-3),
    "AdamW, paged 32 bit (bitsandbytes)": _of("bitsandbytes.optim", "PagedAdamW32bit", lr=1e-3),
    "Lion, 8 bit (bitsandbytes)": _of("bitsandbytes.optim", "Lion8bit", lr=1e-3),
    "Muon + AdamW, two optimizers": _two,
    "Muon + AdamW in one": lambda model, groups: MuonAndAdamW(groups, lr=1e-3),
    "schedule-free AdamW": _of("schedulefree", "AdamWScheduleFree", lr=1e-3),
    "schedule-free RAdam": _of("schedulefree", "RAdamScheduleFree", lr=1e-3),
    "schedule-free SGD": _of("schedulefree", "SGDScheduleFree", lr=0.01),
    "schedule-free wrapper of SGD": _schedule_free_wrapper,
    "SAM of SGD": lambda model, groups: SharpnessAware(groups, lr=0.01),
    "SAM of AdamW": lambda model, groups: SharpnessAware(groups, torch.optim.AdamW, lr=1e-3),
    "GaLore AdamW": _low_rank("galore_torch", "GaLoreAdamW", scale=0.25, proj_type="std"),
    "APOLLO AdamW": _low_rank(
        "apollo_torch", "APOLLOAdamW", scale=1.0, proj_type="std", proj="random", scale_type="channel"
    ),
    "LOMO": _of_model("Lomo"),
    "AdaLOMO": _of_model("AdaLomo"),
    "AdamW in accelerate's wrapper": _in_accelerate,
}
RATES = {  # η of λ where steps are as small as gradients
    "SGD, momentum": 5.0,
    "schedule-free SGD": 20.0,
    "schedule-free wrapper of SGD": 20.0,
    "SAM of SGD": 20.0,
    "ASGD": 20.0,
    "Adadelta": 5.0,
}


def _loop(
    model: nn.Module,
    optimizers: list[Any],
    read: Callable[[], Profile],
    clip_now: Callable[[], int] = lambda: 0,
    led_by: Run | None = None,
    watched: list[nn.Parameter] | None = None,
    autocast: bool = False,
) -> Run:
    run = Run()
    run.watch_gradients(watched or [], led_by)
    data = Rows()
    _set_mode(optimizers, "train")
    for step in range(STEPS):
        batch = default_collate([data[(step * BATCH + i) % len(data)] for i in range(BATCH)])

        def backward(batch: dict[str, Tensor] = batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss: Tensor = model(**batch).loss
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        backward()
        for optimizer in optimizers:
            optimizer.step(*[backward] * isinstance(optimizer, SharpnessAware))
        for optimizer in optimizers:
            optimizer.zero_grad()
        run.clipped += clip_now()
        run.after_step(model, read(), led_by)
    _set_mode(optimizers, "eval")
    run.profiles.append(read())
    return run


def _set_mode(optimizers: list[Any], name: str) -> None:
    for optimizer in optimizers:
        if inspect.ismethod(getattr(optimizer, name, None)):
            getattr(optimizer, name)()


def with_loop(cell: Cell) -> Outcome:
    make, rate = LOOPS[cell.optimizer], RATES.get(cell.optimizer, RATE)
    model = ours(dtype_of(cell))
    other, hardness = twin(dtype_of(cell))
    try:
        optimizers = _made(make, model, hlg.parameter_groups(model, rate))
        hlg.attach_hardness_update(optimizers[-1], model)
    except Exception as error:
        return refused(Refusal(error, True), lambda: _made(make, other, twin_groups(other, hardness, rate)))
    half = cell.precision != "fp32"
    autocast = cell.precision == "bf16"
    watched = parameters_of(model) if half else None
    mine = _loop(model, optimizers, lambda: list(hlg.hardness_profile(model).values()), watched=watched, autocast=autocast)
    optimizers = _made(make, other, twin_groups(other, hardness, rate))
    clip_now = partial(clip, hardness, optimizers[-1])
    if hasattr(optimizers[-1], "base"):  # a wrapper makes its average of what the optimizer that it wraps has stepped
        clip_now = _clipping_inside(optimizers[-1].base, hardness)
    theirs = _loop(
        other, optimizers, lambda: [p.item() for p in hardness], clip_now, mine, hardness if half else None, autocast
    )
    return compared(cell, mine, theirs, "plain loop")


def _made(make: Make, model: nn.Module, groups: list[dict[str, Any]]) -> list[Any]:
    made = make(model, groups)
    return made if isinstance(made, list) else [made]


def _clipping_inside(optimizer: Any, hardness: list[nn.Parameter]) -> Callable[[], int]:
    """Has the optimizer clip λ after its own step; returns what tells how many the last one has clipped."""
    step = optimizer.step
    counts = [0]

    def clipped_step() -> None:
        step()
        counts.append(clip(hardness, torch.optim.SGD(hardness)))

    optimizer.step = clipped_step
    return lambda: counts[-1]
