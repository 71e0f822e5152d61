"""Whether a checkpoint is whole, told by its files before anything is loaded.

A Trainer writes a checkpoint file by file, into its place: a process that is killed meanwhile leaves a part of it. What is
read here are the headers of safetensors, the directories of zip files, JSON, and tensors of a few elements; no pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..activation.older_checkpoints import NAME

_NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|lambda_gelu_hardness")
_TORCH = re.compile(r"(pytorch_model|adapter_model|optimizer|training_args)")
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
_FEW = 1 << 16  # elements: biases and norms, which diverge with the rest
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Broken(Exception):
    """What is wrong with a checkpoint."""


def fault(folder: Path, args: TrainingArguments | None = None) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole.

    Adapters, shards, and what FSDP and DeepSpeed write count as weights too. Without optimizer, scheduler and random state
    all three, as `save_only_model` leaves it, a checkpoint is whole.

    Args:
        args: of the run that shall go on; of as many processes as the checkpoint is of, each needs its own random state.
    """
    try:
        state = _state(folder)
        _check_files(folder)
        _check_there(folder, state, args)
        _check_numbers(folder, state)
    except _Broken as broken:
        return str(broken)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    return None


def _state(folder: Path) -> dict[str, Any]:
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise _Broken(f"{path.name} is missing, which is written last: the save was not finished")
    state = _json(path)
    if not isinstance(state.get("global_step"), int):
        raise _Broken(f"{path.name} has no global_step")
    return state


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Broken(f"{path.name} is not JSON to its end: {error}") from error
    if not isinstance(content, dict):
        raise _Broken(f"{path.name} holds a {type(content).__name__}, expected an object")
    return content


def _check_files(folder: Path) -> None:
    """Every file is whole, as far as its format says where it ends."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
            _check_zip(path)
        elif path.name.endswith(".index.json"):
            _check_index(path)
        elif path.suffix == ".distcp" and not (path.parent / ".metadata").is_file():
            raise _Broken(f"{path.parent.name}/.metadata is missing, which is written last: the save was not finished")


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _Broken(f"{path.name} is cut off: it has {size} bytes, and its header is not among them")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            end = max([entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"], default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Broken(f"{path.name} has a damaged header ({error!r})") from error
    if size != 8 + length + end:
        raise _Broken(f"{path.name} has {size} bytes, its header says {8 + length + end}")


def _check_zip(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(2)
    foreign = path.suffix == ".bin" and start != b"PK" and not _TORCH.match(path.name)  # of a tokenizer, for one
    if start[:1] == b"\x80" or foreign:  # \x80: torch's format before 1.6, which says nothing of its end
        return
    try:
        zipfile.ZipFile(path).close()  # reads the directory, which is at the end
    except (zipfile.BadZipFile, ValueError) as error:
        raise _Broken(f"{path.name} is cut off or damaged: it has {path.stat().st_size} bytes ({error})") from error


def _check_index(path: Path) -> None:
    places = _json(path).get("weight_map")
    if not isinstance(places, dict):
        raise _Broken(f"{path.name} has no weight_map")
    missing = sorted({str(name) for name in places.values() if not (path.parent / str(name)).is_file()})
    if missing:
        raise _Broken(f"{missing[0]} is missing, one of {len(missing)} that {path.name} names")


def _check_there(folder: Path, state: dict[str, Any], args: TrainingArguments | None) -> None:
    """Weights are there, and what the optimizer needs, or nothing of that."""
    names = os.listdir(folder)
    deepspeed = (folder / "latest").is_file()
    if deepspeed:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        if not tag or not (folder / tag).is_dir():
            raise _Broken(f"'latest' names {tag!r}, which is missing")
    elif not _has_weights(folder):
        raise _Broken("model.safetensors is missing, and there are no other weights")
    parts = {
        OPTIMIZER_NAME: deepspeed or any("optimizer" in name for name in names),
        SCHEDULER_NAME: SCHEDULER_NAME in names,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    absent = [name for name, there in parts.items() if not there and not (deepspeed and name == SCHEDULER_NAME)]
    if 0 < len(absent) < len(parts):
        raise _Broken(f"{absent[0]} is missing")
    if args is not None and args.world_size > 1 and args.world_size == hardening_state(state).get("processes"):
        own = f"rng_state_{args.process_index}.pth"
        if own not in names:
            raise _Broken(f"{own} is missing: the save of process {args.process_index} was not finished")


def _has_weights(folder: Path) -> bool:
    for path in folder.rglob("*"):
        weights = path.suffix in (".safetensors", ".bin", ".distcp") and not _NOT_WEIGHTS.search(
            str(path.relative_to(folder))
        )
        if weights and path.is_file():
            return True
    return False


def hardening_state(state: dict[str, Any]) -> dict[str, Any]:
    """What the callback that hardens has stored."""
    callbacks = state.get("stateful_callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    found = [each.get("attributes") for each in states if isinstance(each, dict)]
    return next((each for each in found if isinstance(each, dict) and "at_switch" in each), {})


def stored_hardening(folder: str | Path) -> dict[str, Any]:
    """`hardening_state` of a checkpoint; empty where it has none."""
    path = Path(folder, TRAINER_STATE_NAME)
    return hardening_state(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _check_numbers(folder: Path, state: dict[str, Any]) -> None:
    """λ is finite, and no bias or norm is NaN."""
    for name, value in (hardening_state(state).get("at_switch") or {}).items():
        if not math.isfinite(value):
            raise _Broken(f"{TRAINER_STATE_NAME} holds λ = {value} of {name}: training had diverged")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if math.prod(file.get_slice(name).get_shape()) > _FEW:
                    continue
                tensor = file.get_tensor(name)
                if tensor.dtype in _FLOATS and _diverged(name, tensor):
                    raise _Broken(f"{path.name} holds {name} with values that are no numbers: training had diverged")


def _diverged(name: str, tensor: torch.Tensor) -> bool:
    bad = ~torch.isfinite(tensor) if name.endswith(NAME) else torch.isnan(tensor)
    return bool(bad.any())
