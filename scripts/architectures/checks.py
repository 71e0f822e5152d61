"""What run.py does with one architecture: `convert_and_save` with this package, `reload` without it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scripts.architectures.tiny_models import CannotBuild, example_inputs, model_class, tiny_model

SEED = 0
FAMILY = ("gelu", "gelu_tanh", "quick_gelu", "silu", "lambda_gelu")
KINDS = ("stock", "relu", "folded")  # what is saved, reloaded and compared: as it came, after relu_ize, after fold


def convert_and_save(model_type: str, auto: str, folder: Path) -> dict[str, Any]:
    """Convert, harden, substitute, fold; save each result with its outputs. Returns a part of the row.

    Where ReLU makes no difference, as behind a layer scale of 1e-6, again with parameters that hide nothing.
    """
    row = _convert_and_save(model_type, auto, folder, awake=False)
    if row.get("effect", 1.0) < 1e-4:
        for kind in KINDS:
            shutil.rmtree(folder / kind, ignore_errors=True)
        row = _convert_and_save(model_type, auto, folder, awake=True)
    return row


def _convert_and_save(model_type: str, auto: str, folder: Path, awake: bool) -> dict[str, Any]:
    hlg = importlib.import_module("hf_lambda_gelu")  # only here: the process that reloads must not have it
    row: dict[str, Any] = {"class": getattr(model_class(model_type, auto), "__name__", "")}
    try:
        model = tiny_model(model_type, auto)
    except CannotBuild as error:
        return {**row, "verdict": "not built", "reason": str(error)}
    if awake:
        wake(model)
    try:
        batch = example_inputs(model)
        expected = outputs(model, batch)
    except Exception as error:
        return {**row, "verdict": "not run", "reason": f"{type(error).__name__}: {error}"}
    torch.save(batch, folder / "batch.pt")
    fresh = copy.deepcopy(model)
    try:
        report = hlg.convert(model)
    except hlg.ConversionError as error:
        told = importlib.import_module("hf_lambda_gelu.structure.smooth_activations").smooth_activations(model)
        row["left"], row["reason"] = len(told), str(error)
        if not told and "not convertible" not in row["reason"]:
            return {**row, "verdict": "no GELU or SiLU", "reason": ""}
        return {**row, "verdict": "refused", "folded_hard_coded": _hard_coded(hlg, fresh, batch)}
    row["sites"], row["left"] = len(report.sites), len(report.unconverted)
    row["attributes"] = " ".join(f"{path}={before}" for path, (before, _) in report.attributes.items())
    row["reason"] = "; ".join(dict.fromkeys(f"{item.what}: {item.reason}" for item in report.unconverted))
    row["convert"] = difference(expected, outputs(model, batch))
    if row["convert"] > 1e-5:  # random networks may blow rounding up
        row["convert"] = _in_double(hlg, fresh, batch)
    _save(fresh, folder / "stock", expected)

    soft = copy.deepcopy(model)
    for site in hlg.hardness_sites(model).values():
        site.set_hardness(1e6)
    hard = outputs(model, batch)
    substituted = hlg.relu_ize(model)
    after = outputs(model, batch)
    row["hardened"], row["effect"] = difference(hard, after), difference(expected, after)
    row["untold"] = _untold(hlg, model, batch, [*report.unconverted, *substituted.left])
    _save(model, folder / "relu", after)

    for index, site in enumerate(hlg.hardness_sites(soft).values()):
        site.set_hardness(1.5 + 0.25 * (index % 4))
    expected = outputs(soft, batch)
    try:
        hlg.fold(soft, batch)
        _save(soft, folder / "folded", expected)
    except hlg.FoldError as error:
        row["fold_refused"] = str(error)
    return row


def reload(model_type: str, auto: str, folder: Path) -> dict[str, Any]:
    """Load what was saved by stock transformers, and compare. Returns the rest of the row."""
    batch = torch.load(folder / "batch.pt")
    row: dict[str, Any] = {}
    for kind in KINDS:
        if not (folder / kind).exists():
            continue
        try:
            model, info = model_class(model_type, auto).from_pretrained(folder / kind, output_loading_info=True)
        except Exception as error:
            row[f"{kind}_reload"] = f"{type(error).__name__}: {error}"[:300]
            continue
        wrong = [key for k in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[k]]
        if wrong and kind != "stock":
            row[f"{kind}_keys"] = str(wrong[0])
        for parameter in model.parameters():  # where the mapped file puts a vector can change the last bit of a product
            parameter.data = parameter.data.clone()
        row[f"{kind}_reload"] = difference(torch.load(folder / f"{kind}.outputs"), outputs(model.eval(), batch))
    return row


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """All floating point tensors of the output; random numbers that the model draws are the same each time."""
    torch.manual_seed(SEED)
    for value in vars(model).values():  # OmDet-Turbo keeps what it made of a text, whatever becomes of its weights
        if isinstance(getattr(value, "cache", None), OrderedDict):
            value.cache.clear()
    result = model(**batch)
    leaves = pytree.tree_leaves(dict(result) if hasattr(result, "items") else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """max |a − b| / max |a| over the tensors; infinite where shapes or what is finite differ."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)))
    return worst


@torch.no_grad()
def wake(model: nn.Module) -> None:
    torch.manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and float(parameter.abs().max()) < 1e-3:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def _in_double(hlg: Any, model: nn.Module, batch: dict[str, Tensor]) -> float:
    model = copy.deepcopy(model).double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    expected = outputs(model, batch)
    hlg.convert(model)
    return difference(expected, outputs(model, batch))


def _save(model: Any, folder: Path, expected: list[Tensor]) -> None:
    model.save_pretrained(folder)
    torch.save(expected, folder.with_suffix(".outputs"))


def _untold(hlg: Any, model: nn.Module, batch: dict[str, Tensor], told: list[Any]) -> str:
    """Smooth activations that a forward pass runs, though the reports name neither them nor their class."""
    names = [item.name.partition(" (")[0] for item in told if not item.name.startswith("config.")]
    names += [match[1] for item in told if (match := re.search(r"(\S+)\.\w+ keeps its name", item.reason))]
    classes = {type(_owner(model, "" if name == type(model).__name__ else name)) for name in names}
    with contextlib.suppress(ValueError):
        found = [entry.name for entry in hlg.audit(model, batch).smooth if entry.kind in FAMILY]
        return " ".join(name for name in dict.fromkeys(found) if type(model.get_submodule(name)) not in classes)
    return ""


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, or the one that keeps a function under it."""
    found: Any = model
    for part in filter(None, name.split(".")):
        inner = getattr(found, part.partition("[")[0], None)
        if not isinstance(inner, nn.Module):
            break
        found = inner
    return found


def _hard_coded(hlg: Any, model: nn.Module, batch: dict[str, Tensor]) -> str:
    """What relu_ize makes of activations that no config attribute governs: how many sites, or why not."""
    try:
        hlg.convert(model, hard_coded=True)
        return f"{len(hlg.relu_ize(model, force=True, calibration=[batch]).folded)} sites"
    except (hlg.ConversionError, hlg.FoldError, hlg.CalibrationError) as error:
        return json.dumps(str(error)[:200])
