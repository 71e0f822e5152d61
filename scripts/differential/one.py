"""One architecture under one condition: refit, then compared with the reference. Returns a part of the row."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from scripts.architectures.tiny_models import CannotBuild
from scripts.differential.conditions import Case, Inapplicable, build, quiet_random, tell_media, without_padding
from scripts.differential.decisions import Decision, recorded
from scripts.differential.reference import Found, Reference
from scripts.differential.rows import gates, main_tensor

EQUAL = 1e-4  # within bf16 autocast too: the rows are the same to the bit, and what is made of them is fp32
REFUSALS = (ValueError, hlg.SoftGateError, hlg.CalibrationError, hlg.ConversionError, hlg.FoldError)


def compare(model_type: str, condition: str) -> dict[str, Any]:
    """The verdict with its numbers. What rounding blows up in fp32 is decided in float64, as rounding differs by design."""
    padding, before = True, ""
    row = _compare(model_type, condition, torch.float32)
    if row["verdict"] == "WRONG" and row.get("untold"):  # text beside images in one tower, positions that are pooled
        padding, before = False, "without padding, which cannot be told from outside; "
        row = _compare(model_type, condition, torch.float32, padding)
    if row["verdict"] == "WRONG" and row["exact"] and not row["certain"]:
        again = _compare(model_type, condition, torch.float64, padding)
        if again["verdict"] != "crash":
            row, before = again, f"{before}in float64; "
    row["reason"] = f"{before}{row['reason']}".removesuffix("; ")
    return {name: value for name, value in row.items() if name not in ("exact", "certain")}


def _compare(model_type: str, condition: str, dtype: torch.dtype, padding: bool = True) -> dict[str, Any]:
    try:
        case = build(model_type, condition)
        if not padding:
            without_padding(case)
        _cast(case, dtype)
        with case.context(), quiet_random(), torch.no_grad():
            case.model(**case.batches[0].inputs)
        tell_media(case)
    except (CannotBuild, Inapplicable) as error:
        return {"verdict": "not built" if isinstance(error, CannotBuild) else "makes no sense", "reason": str(error)}
    except Exception as error:
        return {"verdict": "not run", "reason": f"{type(error).__name__}: {error}"}
    try:
        hlg.convert(case.model)
    except hlg.ConversionError as error:
        return {"verdict": "no map", "reason": str(error)}
    for part in case.model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_experts_implementation("eager")  # where each expert is a map of its own
    before = copy.deepcopy(case.model)
    wrapped = case.wrap(case.model)
    state = _state(case.model)
    with recorded() as decisions:
        try:
            with case.context():
                report = hlg.relu_ize(
                    wrapped, calibration=[dict(b.inputs) for b in case.batches], compensate="least_squares"
                )
        except REFUSALS as error:
            changed = _changed(state, _state(case.model))
            reason = f"{type(error).__name__}: {error}"
            return {
                "verdict": "WRONG" if changed else "refused",
                "reason": f"{changed} was changed; {reason}" if changed else reason,
                "exact": False,
            }
    return _row(case, before, decisions, report)


def _row(case: Case, before: nn.Module, decisions: list[Decision], report: Any) -> dict[str, Any]:
    final = dict(case.model.state_dict())
    change = _change(case, copy.deepcopy(before), final)
    for decision in decisions:
        _unwrapped(decision)
    reference = Reference(before, final, case, _decoder(before))
    found: Found = reference.compare(decisions)
    faults = [*found.faults]
    equal = EQUAL if case.exact else max(EQUAL, found.rounding)  # an exact case is decided in float64
    if found.distance > equal or found.distance != found.distance:
        faults.insert(0, f"{found.distance:.1e} at {found.site}")
    named = {site.name.removeprefix("_orig_mod.") for site in report.compensation.sites}
    if named != {decision.site for decision in decisions}:
        faults.append("the report names other sites than were refit")
    return {
        "verdict": "WRONG" if faults else "equal",
        "distance": found.distance,
        "sites": len(decisions),
        "methods": _methods(decisions),
        "rows": found.rows,
        "padding": found.padding,
        "untold": found.untold,
        "change": change,
        "reason": "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else ""),
        "exact": case.exact,
        "certain": any("counted" in fault or "belongs" in fault or "take up" in fault for fault in faults),
    }


def _methods(decisions: list[Decision]) -> str:
    counts = Counter(linear.method for decision in decisions for linear in decision.maps)
    return ", ".join(f"{name} × {count}" for name, count in sorted(counts.items()))


def _change(case: Case, before: nn.Module, final: dict[str, Tensor]) -> float:
    """How far the refit model's outputs are from the smooth ones, the naive swap's distance being 1. It knows no targets."""
    sites = hlg.hardness_sites(before)
    refit, naive = 0.0, 0.0
    for batch in case.batches:
        outputs = []
        for model, hard in ((before, set()), (before, set(sites)), (case.model, set())):
            with gates(sites, hard), case.context(), quiet_random(), torch.no_grad():
                outputs.append(main_tensor(model(**batch.inputs)))
        smooth, swapped, made = (torch.zeros(1) if o is None else o.double() for o in outputs)
        if smooth.shape != made.shape or smooth.shape != swapped.shape:
            return float("nan")
        mask = batch.tokens if batch.decoder is None else batch.decoder
        if mask is not None and smooth.shape[:2] == mask.shape:
            smooth, swapped, made = smooth[mask], swapped[mask], made[mask]
        refit += float((made - smooth).square().sum())
        naive += float((swapped - smooth).square().sum())
    return (refit / max(naive, 1e-300)) ** 0.5


def _unwrapped(decision: Decision) -> None:
    """The names without what `torch.compile` puts before them."""

    def plain(name: str) -> str:
        return name.replace("_orig_mod.", "").removesuffix("_orig_mod")

    decision.site, decision.block = plain(decision.site), plain(decision.block)
    decision.module = None if decision.module is None else plain(decision.module) or None
    decision.hard = {plain(name) for name in decision.hard}
    for linear in decision.maps:
        linear.weight, linear.bias = plain(linear.weight), None if linear.bias is None else plain(linear.bias)


def _decoder(model: nn.Module) -> set[str]:
    """Names of the decoder of an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    return {name for name, _ in model.named_modules() if name.split(".")[-1] == "decoder"} | {"lm_head"}


def _cast(case: Case, dtype: torch.dtype) -> None:
    case.model.to(dtype)
    for batch in case.batches:
        for name, value in batch.inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                batch.inputs[name] = value.to(dtype)


def _state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {f"class of {name}": type(module).__name__ for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    return state | ({"config": str(config.to_dict())} if config is not None else {})


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    for name in before.keys() | after.keys():
        one, other = before.get(name), after.get(name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.is_meta or other.is_meta:
                continue
            if not torch.equal(one, other) and not (one.isnan() & other.isnan() | (one == other)).all():
                return name
        elif one != other:
            return name
    return ""
