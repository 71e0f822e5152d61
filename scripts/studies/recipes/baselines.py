"""What λ-GELU is compared with first: GELU and what follows it untrained, ReLU first, ReLU from the middle on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, TrainerCallback

import hf_lambda_gelu as hlg
from scripts.studies.recipes.recipe import Result, Run, recipe


@recipe
def gelu(run: Run) -> dict[str, Result]:
    """Fine-tune GELU; then four substitutions without training."""
    model = run.model()
    run.trainer(model).train()
    smooth = run.judge(model)
    if run.trial:
        return {"gelu": Result(smooth)}
    hlg.convert(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = {"gelu": Result(smooth)}
    with hlg.gates_as_relu(model):
        results["swap"] = Result(run.judge(model), smooth)
    ways: dict[str, dict[str, Any]] = {method: {"compensate": method} for method in ("bias", "least_squares")}
    if run.task.pretrained:  # of the small networks some have layers whose width no number of the config says
        ways["hinges"] = {"compensate": "least_squares", "hinges": 2}
    for name, options in ways.items():
        again = run.model()
        hlg.convert(again)
        again.load_state_dict(weights)
        hlg.relu_ize(again, calibration=run.calibration(), **options)
        results[f"{name}_after"] = Result(run.judge(again), smooth)
    return results


def _relu_first(run: Run, **options: Any) -> Result:
    model = run.model()
    hlg.convert(model)
    hlg.relu_ize(model, **options)
    run.trainer(model).train()
    return Result(run.judge(model))


@recipe
def relu_first(run: Run) -> dict[str, Result]:
    """Swap ReLU in, fine-tune as long."""
    return {"relu_first": _relu_first(run, force=True)}


@recipe
def bias_first(run: Run) -> dict[str, Result]:
    """Bias-compensated substitution, then fine-tune."""
    return {"bias_first": _relu_first(run, calibration=run.calibration(), compensate="bias")}


@recipe
def least_squares_first(run: Run) -> dict[str, Result]:
    """Compensated substitution, then fine-tune."""
    return {"least_squares_first": _relu_first(run, calibration=run.calibration(), compensate="least_squares")}


class _SubstituteAt(TrainerCallback):
    """Compensated substitution at a fraction of training; the optimizer goes on with the same parameters."""

    def __init__(self, run: Run, fraction: float, method: str) -> None:
        self.run, self.fraction, self.method, self.done = run, fraction, method, False

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.done and state.global_step >= self.fraction * state.max_steps:
            hlg.relu_ize(model, calibration=self.run.calibration(), compensate=self.method)
            self.done = True


def _midway(run: Run, fraction: float) -> Result:
    model = run.model()
    hlg.convert(model)
    for site in hlg.hardness_sites(model).values():  # λ stays 1: the gates are the model's own until they are ReLU
        site.unclipped_hardness.requires_grad_(False)
    run.trainer(model, (_SubstituteAt(run, fraction, "least_squares"),)).train()
    return Result(run.judge(model))


@recipe
def midway(run: Run) -> dict[str, Result]:
    """Fine-tune GELU for half of the steps, substitute with compensation, fine-tune ReLU for the rest."""
    return {"midway": _midway(run, 0.5)}
