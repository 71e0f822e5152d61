"""What is looked at before a Trainer runs: its arguments, a model with λ-GELU, a checkpoint of the same sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..activation.module import hardness_sites
from ..activation.older_checkpoints import NAME, OLDER
from ..checkpoints.folders import check_writable
from ..checkpoints.shards import tensor_names
from ..measurement.batches import takes_a_mapping
from ..structure.adapters import has_adapters
from ..structure.hard_coded import hard_coded_sites
from ..structure.offloading import check_not_offloaded
from .arguments import LambdaGELUTrainingArguments
from .sparsity_penalty import check_penalisable

logger = logging.get_logger(__name__)


def check_arguments(args: Any, model: nn.Module | None) -> None:
    """Raises ValueError for arguments of another class, an offloaded model, a folder that cannot be written."""
    if not isinstance(args, LambdaGELUTrainingArguments):
        raise ValueError(
            f"LambdaGELUTrainer expects LambdaGELUTrainingArguments, got {type(args).__name__}: they hold the hardness "
            "schedule beside all fields of TrainingArguments"
        )
    if isinstance(model, nn.Module):
        check_not_offloaded(model)
    if args.output_dir is not None:
        check_writable(args.output_dir)
    check_generation(args)


def check_generation(args: TrainingArguments) -> None:
    """Raises ValueError where TRL is to generate with a network that is not the one that is trained."""
    if getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm=True generates by vLLM, whose own models know no λ-GELU: the words would be those of another network. "
            "Set use_vllm=False"
        )


def check_trainable(
    args: LambdaGELUTrainingArguments, model: nn.Module, reference: nn.Module | None = None, engine: bool = False
) -> None:
    """Raises ValueError where this model cannot be trained so; warns of frozen λ, and of a best checkpoint that is soft.

    Args:
        reference: the second model of TRL's trainers.
        engine: whether FSDP or DeepSpeed is asked for, be it by accelerate's own config.
    """
    if not hardness_sites(model):
        raise ValueError(
            f"{type(model).__name__} has no λ-GELU: call hf_lambda_gelu.convert(model) before building the trainer"
        )
    hard_coded_sites(model)  # raises for λ that no checkpoint would hold
    if has_adapters(model):
        _check_adapters(args, model)
    warn_if_frozen(model)
    if getattr(args, "sync_ref_model", False) and reference is not None:
        _check_alike(model, reference)
    if args.sparsity_penalty:
        check_penalisable(args, model, engine)
    _check_best(args)


def _check_adapters(args: LambdaGELUTrainingArguments, model: nn.Module) -> None:
    if args.hardness_compensate != "none":
        raise ValueError(
            f"hardness_compensate={args.hardness_compensate!r} refits base weights, which checkpoints of adapters "
            "do not hold: set hardness_compensate='none', for a ramp, or merge after training and substitute by "
            "relu_ize(model, calibration=…, compensate='least_squares')"
        )


def warn_if_frozen(model: nn.Module) -> None:
    """Says which λ are not learned, as a backbone is frozen after `convert`, and what to do."""
    frozen = [name for name, site in hardness_sites(model).items() if not site.unclipped_hardness.requires_grad]
    if frozen:
        way = (
            "PEFT freezes what is there when it wraps a model. To learn λ, call convert after it"
            if has_adapters(model)
            else "it is not learned there, and goes to its target at the switch all the same. To learn λ where weights are "
            "frozen: for site in hlg.hardness_sites(model).values(): site.requires_grad_(True)"
        )
        logger.warning(f"λ of {len(frozen)} sites is frozen, {frozen[0]} the first: {way}")


def check_reference(args: TrainingArguments) -> None:
    """Raises ValueError where TRL takes its reference from the model by switching adapters off: that has the run's λ."""
    beta = getattr(args, "beta", 0.0)
    if beta and not getattr(args, "precompute_ref_log_probs", False):
        raise ValueError(
            f"beta={beta:g} holds the model against a reference, which is the model itself without its adapters, and so has "
            "its λ: it would harden in the course of the run, without a training. Set precompute_ref_log_probs=True, pass a "
            "ref_model of its own, or set beta=0.0, whichever of these the trainer takes"
        )


def _check_alike(model: nn.Module, reference: nn.Module) -> None:
    """TRL mixes parameters by their order, after hundreds of steps: then it is late to see that there are others."""
    if [p.shape for p in model.parameters()] != [p.shape for p in reference.parameters()]:
        raise ValueError(
            "sync_ref_model=True mixes the parameters of the model into those of ref_model, which has no λ: pass "
            "ref_model=copy.deepcopy(model), made after convert, or set sync_ref_model=False"
        )


def _check_best(args: LambdaGELUTrainingArguments) -> None:
    best = args.metric_for_best_model or ""
    if "relu_" in best and not args.eval_relu:
        raise ValueError(f"metric_for_best_model={best!r} is not measured with eval_relu=False: set eval_relu=True")
    asked = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy='best'"
    if (args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST) and "relu_" not in best:
        logger.warning(
            f"{asked} with metric_for_best_model={best!r} may choose a checkpoint from before the gates were hard: choose "
            f"by the ReLU metrics, e.g. 'eval_relu_{best.removeprefix('eval_')}'"
        )


def check_same_sites(model: nn.Module, checkpoint: str) -> None:
    """Raises ValueError unless the checkpoint holds λ of the model's sites: Trainer would let λ silently start over."""
    if takes_a_mapping(model):  # SentenceTransformer's trainer builds what was saved anew, and wants each of its tensors
        return
    saved = tensor_names(Path(checkpoint))  # of adapters and of FSDP, PEFT and accelerate check them
    if saved is None:
        return
    wanted = {f"{name}.{NAME}" for name in hardness_sites(model)}
    found = {key.replace(OLDER, NAME) for key in saved if key.endswith((NAME, OLDER))}
    if found != wanted:
        raise ValueError(
            f"cannot resume from {checkpoint}: it holds λ for {len(found)} sites, the model has "
            f"{len(wanted)}; only in the checkpoint: {sorted(found - wanted)}, only in the model: "
            f"{sorted(wanted - found)}. Convert the model as the interrupted run did, or start a new run"
        )
