"""`LambdaGELUTrainingArguments`: transformers' arguments and those of hardness learning."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol

from transformers import TrainingArguments

from ..activation.hardness import DEFAULT_RELATIVE_TOLERANCE, DEFAULT_TOLERANCE, check_relative_tolerance, target_hardness
from ..surgery.hinges.wanted import Wanted, check_hinges
from .schedule import check_schedule

_TARGETS = ("l1", "calibrated")
_COMPENSATE = ("least_squares", "bias", "none")
_SPARSITY_NORMS = ("hoyer", "l1")


@dataclass
class LambdaGELUTrainingArguments(TrainingArguments):
    """Holds the arguments of `LambdaGELUTrainer`: all fields of `TrainingArguments`, and those below.

    Learning with a ramp is the paper's (arXiv 2603.21991); the refit, calibrated targets and the penalty are derived.
    Fractions are of the optimizer steps of the run.

    With `sparsity_penalty` w > 0, gradients are those of loss + w · P, for more exact zeros in the ReLU network. P is the
    mean over sites, examples and tokens, padding left out, of a norm of r = max(z, 0), where z are the d pre-activations of
    a site (of the gate, in a gated FFN) at a token, and r is what ReLU will put out for them, whatever λ is now:

    - "l1": Σ r / √(d Σ r²), from 1/√d, where one unit fires, to 1, where all fire alike. The divisor gets no gradient, so
      that all r > 0 of a token shrink alike;
    - "hoyer": (Σ r)² / (d Σ r²), from 1/d to 1, by which large r grow and small ones shrink. The Hoyer-square norm is of
      DeepHoyer (Yang et al. 2020, arXiv 1908.09979), there on weights.

    Neither changes with the scale of z, nor if every unit is repeated: one w means about the same in any model.

    Raises:
        ValueError: a value out of its range; the message names it.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> arguments = hlg.LambdaGELUTrainingArguments("runs/bert", learning_rate=5e-5, hardness_switch_point=0.5)
        >>> arguments.hardness_compensate
        'least_squares'
    """

    hardness_learning_rate: float = field(
        default=0.01,
        metadata={"help": "Learning rate of the hardness, in units of λ per step; follows the run's schedule, no decay."},
    )
    hardness_switch_point: float = field(
        default=0.75,
        metadata={
            "help": "Fraction of training after which λ is no longer learned but goes to its target, in [0, 1]. A ramp "
            "wants more room: the paper's heuristic for its own is 0.25."
        },
    )
    hardness_compensate: Literal["least_squares", "bias", "none"] = field(
        default="least_squares",
        metadata={
            "help": "least_squares: at the switch λ goes to its target at once, and the linear maps after the activations "
            "are refit on 300 training examples so that the function stays. bias: only their biases. none: λ follows "
            "hardness_ramp."
        },
    )
    hardness_ramp: Literal["geometric", "linear", "cosine", "reciprocal"] = field(
        default="geometric",
        metadata={"help": "Shape of the ramp, without compensation; reciprocal is linear in 1/λ, geometric in log λ."},
    )
    hardness_target: Literal["l1", "calibrated"] = field(
        default="l1",
        metadata={
            "help": "What λ goes to from the switch on. l1: the same for all layers, from hardness_tolerance. calibrated: "
            "each layer's own, from hardness_relative_tolerance and what it gets at the switch on examples of the training "
            "set."
        },
    )
    hardness_tolerance: float = field(
        default=DEFAULT_TOLERANCE,
        metadata={
            "help": "ε, the l1 distance between the hardened gate and a step: the target is λ = 2 / (ε √(2π)) for the erf "
            "gate. 0.005 gives 159.58. With hardness_target calibrated, for layers that no example reaches."
        },
    )
    hardness_relative_tolerance: float = field(
        default=DEFAULT_RELATIVE_TOLERANCE,
        metadata={
            "help": "τ, for hardness_target calibrated: the target is the λ at which replacing a layer's activation by ReLU "
            "changes its output by this fraction, root mean square. 0.01 is one percent."
        },
    )
    hardness_hold: float = field(
        default=0.1, metadata={"help": "Fraction of training at the end of a ramp with λ at the target, in [0, 1]."}
    )
    hardness_hinges: int = field(
        default=1,
        metadata={
            "help": "k ReLUs in the place of each gate from the switch on, in layers k times as wide: 2 to 4, placed by the "
            "examples of the refit. 1: one, in layers as wide as they are."
        },
    )
    hardness_budget: float | None = field(
        default=None,
        metadata={
            "help": "In place of hardness_hinges: the width from the switch on over the width before, from 1 to 4, spent on "
            "the neurons that it helps most."
        },
    )
    sparsity_penalty: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a penalty on what the activations let through, max(z, 0) of what enters them, for more exact "
            "zeros in the ReLU network; 0 for none."
        },
    )
    sparsity_norm: Literal["hoyer", "l1"] = field(
        default="hoyer",
        metadata={
            "help": "What is penalised of the d units r at a token. l1: Σ r / √(d Σ r²), the divisor held fixed. hoyer: "
            "(Σ r)² / (d Σ r²). The mean over tokens, examples and layers."
        },
    )
    eval_relu: bool = field(
        default=True,
        metadata={
            "help": "Evaluate a second time with the gates as ReLU and report it as eval_relu_*, next to eval_*. "
            "metric_for_best_model can name one of these."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lets a class that is joined with another library's arguments have that one's defaults, whatever their order.

        A dataclass takes each field from the first base that has it: this one has all those of TrainingArguments.
        """
        super().__init_subclass__(**kwargs)
        own = inspect.get_annotations(cls)
        bases = [base for base in cls.__mro__[1:] if base not in LambdaGELUTrainingArguments.__mro__]
        for base in reversed([base for base in bases if is_dataclass(base)]):
            for name in set(inspect.get_annotations(base)) & {f.name for f in fields(TrainingArguments)} - set(own):
                cls.__annotations__ = inspect.get_annotations(cls) | {name: base.__dataclass_fields__[name].type}
                setattr(cls, name, copy.copy(base.__dataclass_fields__[name]))

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers' own has no types

    def check(self) -> None:
        """Raises ValueError, which names it, for a value out of its range: searches set values after the class was made."""
        check_hardening(self)
        if self.sparsity_norm not in _SPARSITY_NORMS:
            raise _unknown("sparsity_norm", self.sparsity_norm, _SPARSITY_NORMS)
        if not (0.0 <= self.hardness_learning_rate < math.inf):
            raise ValueError(f"hardness_learning_rate must be a finite number >= 0, got {self.hardness_learning_rate}")
        if not (0.0 <= self.sparsity_penalty < math.inf):
            raise ValueError(f"sparsity_penalty must be a finite number >= 0, got {self.sparsity_penalty}: 0 is none")


class Hardening(Protocol):
    """What says how λ is hardened; the fields are those of `LambdaGELUTrainingArguments`."""

    hardness_switch_point: float
    hardness_compensate: Literal["least_squares", "bias", "none"]
    hardness_ramp: Literal["geometric", "linear", "cosine", "reciprocal"]
    hardness_target: Literal["l1", "calibrated"]
    hardness_tolerance: float
    hardness_relative_tolerance: float
    hardness_hold: float
    hardness_hinges: int
    hardness_budget: float | None


def check_hardening(args: Hardening) -> None:
    """Raises ValueError, which names it, for a value out of its range."""
    check_schedule(0.0, args.hardness_hold, args.hardness_ramp)
    held = args.hardness_hold if args.hardness_compensate == "none" else 0.0  # without a ramp there is no hold to fit in
    check_schedule(args.hardness_switch_point, held, args.hardness_ramp)
    target_hardness(args.hardness_tolerance)
    check_relative_tolerance(args.hardness_relative_tolerance)
    for name, known in {"hardness_target": _TARGETS, "hardness_compensate": _COMPENSATE}.items():
        if getattr(args, name) not in known:
            raise _unknown(name, getattr(args, name), known)
    _check_width(args)


def wanted_hinges(args: Hardening) -> Wanted | None:
    """How wide the layers shall be from the switch on; None for as wide as they are."""
    return check_hinges(args.hardness_hinges, args.hardness_budget, measured=True)


def _check_width(args: Hardening) -> None:
    try:
        wanted = wanted_hinges(args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"hardness_hinges and hardness_budget: {error}") from error
    if wanted is None:
        return
    asked = (
        f"hardness_hinges={args.hardness_hinges}" if args.hardness_budget is None else f"hardness_budget={wanted.factor:g}"
    )
    if args.hardness_compensate == "none":
        raise ValueError(
            f"{asked} wants the refit of the switch, which says where the ReLUs lie, and hardness_compensate='none' is a "
            "ramp without one: set hardness_compensate='least_squares'"
        )
    if args.hardness_target == "calibrated":
        raise ValueError(
            f"{asked} moves the gates' bends to where a layer's inputs are, so that targets measured before that are too "
            "soft: set hardness_target='l1'"
        )


def _unknown(name: str, value: object, known: tuple[str, ...]) -> ValueError:
    return ValueError(f"unknown {name} {value!r}: expected {' or '.join(map(repr, known))}")
