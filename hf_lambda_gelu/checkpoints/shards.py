"""The weights of a checkpoint folder as files: read without their data, linked, copied, rewritten in a stream.

A safetensors file is 8 bytes with the length of its header, little-endian; the header, JSON with dtype, shape and place of
each tensor; and the data of the tensors, without holes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..structure.file_source import mapped
from ..structure.loading import CheckpointError, checkpoint_errors
from .folders import of_the_cache

_CHUNK = 4 << 20  # bytes that are in memory at a time
_METADATA = "__metadata__"
# other formats of the same weights, which would be stale beside the new ones, and a Trainer's state
_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pkl", ".pt", ".pth", ".tflite"}
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
_TRAINER = {"trainer_state.json", "training_args.json"}


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a tensor's bytes: a file with nothing else in it; the tensor's shape, in the same dtype."""

    path: Path
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Shard:
    """A safetensors file and its tensors, on the meta device."""

    path: Path
    tensors: dict[str, Tensor]


def read_shards(folder: Path, class_name: str) -> list[Shard]:
    """The weight files of a checkpoint folder, in the order of their names. Only their headers are read.

    Args:
        class_name: the model's, for a message that says how to make safetensors of pickles.

    Raises:
        CheckpointError: pickles or adapters only, no weights, a file that is missing or damaged, or lacks a tensor that the
            index says it has.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds adapters ({ADAPTER_CONFIG_NAME}): load them onto their base model, merge_and_unload() "
            "and save_pretrained; then pass that folder"
        )
    if single.is_file():  # first, as in from_pretrained
        return [_read(single)]
    if not index.is_file():
        raise CheckpointError(_no_weights(folder, class_name))
    with checkpoint_errors(f"{str(index)!r} is damaged, fetch it again: expected JSON with a weight_map"):
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index.name} names {outside[0]!r}: expected the names of files beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing in {str(folder)!r}, {missing[0]} the first of them: the "
            "download or copy is not complete"
        )
    shards = [_read(folder / name) for name in names]
    absent = [(n, s.path.name) for s in shards for n, place in places.items() if place == s.path.name and n not in s.tensors]
    if absent:
        raise CheckpointError(
            f"{index.name} says that {absent[0][1]} holds {absent[0][0]}, which it does not ({len(absent)} such tensors): "
            "index and shards are not of one checkpoint. Fetch it again"
        )
    return shards


def mapped_tensors(path: Path) -> dict[str, tuple[Tensor, int]]:
    """The tensors of a weight file as views of it, which are read when somebody looks at them, and where each begins.

    Raises:
        CheckpointError: damaged, or with tensors that do not begin where their elements could.
    """
    with checkpoint_errors(f"{str(path)!r} is damaged or no safetensors file, fetch it again"):
        shapes, whole = _read(path).tensors, mapped(path)
        with path.open("rb") as file:
            length, header = _header(file)
        starts = {name: 8 + length + header[name]["data_offsets"][0] for name in shapes}
        return {
            name: (whole[start : start + shapes[name].nbytes].view(shapes[name].dtype).view(shapes[name].shape), start)
            for name, start in starts.items()
        }


def tensor_names(folder: Path) -> set[str] | None:
    """The names of a checkpoint's tensors; None where they are not in safetensors, as adapters and FSDP's shards are not."""
    with checkpoint_errors(f"the weights in {str(folder)!r} are damaged"):
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
                return set(file.keys())
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
    return None


def _read(path: Path) -> Shard:
    with checkpoint_errors(f"{str(path)!r} is damaged or no safetensors file, fetch it again"):
        return Shard(path, load_state_dict(path, map_location="meta"))


def _no_weights(folder: Path, class_name: str) -> str:
    pickles = sorted(p.name for p in folder.glob("*model*") if p.suffix in _PICKLES)
    expected = f"{SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its shards"
    if not pickles:
        return f"{str(folder)!r} holds no weights: expected {expected}"
    return (
        f"{str(folder)!r} holds its weights as a pickle ({pickles[0]}), which cannot be read in parts: expected {expected}. "
        f"To convert it, where it fits into memory: {class_name}.from_pretrained({str(folder)!r}).save_pretrained(folder)"
    )


def shard_names(count: int) -> list[str]:
    """The names that transformers gives to `count` weight files."""
    stem, suffix = os.path.splitext(SAFE_WEIGHTS_NAME)
    return [SAFE_WEIGHTS_NAME] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def write_index(folder: Path, places: dict[str, str], metadata: dict[str, Any]) -> None:
    """Writes the index: {tensor: file}."""
    text = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def side_files(folder: Path) -> list[Path]:
    """What else belongs to the checkpoint, as relative paths: tokenizer, processor, card, a pooling module's folder.

    Not the config and the weights, in whatever format, nor what a Trainer keeps to go on, nor hidden files.

    Raises:
        CheckpointError: a link that leads out of the folder, and not into the Hub's cache.
    """
    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        folders[:] = [n for n in folders if not n.startswith((".", "checkpoint-")) and n not in ("onnx", "openvino", "runs")]
        for name in files:
            suffix, top = Path(name).suffix, here == Path()
            weights = suffix in _WEIGHTS or name.endswith(".index.json") or (top and suffix == ".safetensors")
            config = top and (name == CONFIG_NAME or name in _TRAINER)
            if not (weights or config or name.startswith(".")) and (folder / here / name).is_file():
                _check_link(folder, here / name)
                found.append(here / name)
    return sorted(found)


def _check_link(folder: Path, name: Path) -> None:
    path = folder / name
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if not (inside or of_the_cache(path)):
        raise CheckpointError(
            f"{str(name)!r} in {str(folder)!r} is a link to {os.readlink(path)!r}, out of the checkpoint: what is there "
            "would be copied. Put the file itself in its place, or remove the link"
        )


def can_link(source: Path, folder: Path) -> bool:
    """Whether a hard link to `source` can be made in `folder`: not across file systems, and not in every one."""
    probe = folder / ".link"
    try:
        os.link(os.path.realpath(source), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def put(source: Path, target: Path, link: bool) -> None:
    """Makes `target` a hard link to `source`, or a copy of it. A symbolic link (the Hub's cache) is followed."""
    if link:
        os.link(os.path.realpath(source), target)
    else:
        shutil.copyfile(source, target)  # in chunks, or by the kernel


def write_changed(source: Path, target: Path, dropped: Collection[str], replaced: Mapping[str, Replacement]) -> None:
    """Writes `source` without some of its tensors and with the bytes of others from files, in a stream.

    The other bytes and the metadata stay as they are.
    """
    with source.open("rb") as file:
        length, header = _header(file)
        metadata = header.pop(_METADATA, None)
        kept = [(name, entry) for name, entry in header.items() if name not in dropped]
        kept.sort(key=lambda item: item[1]["data_offsets"][0])
        # as safetensors does: the largest first, so that all are aligned
        kept.sort(key=lambda item: -_bits(item[1]["dtype"]))
        placed: dict[str, Any] = {} if metadata is None else {_METADATA: metadata}
        end = 0
        for name, entry in kept:
            start, (first, last) = end, entry["data_offsets"]
            new = replaced.get(name)
            end = start + (last - first if new is None else new.size)
            shape = entry["shape"] if new is None else list(new.shape)
            placed[name] = {**entry, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(placed, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, entry in kept:
                first, last = entry["data_offsets"]
                if name in replaced:
                    with replaced[name].path.open("rb") as bytes_of_it:
                        _copy(bytes_of_it, out, 0, replaced[name].size)
                else:
                    _copy(file, out, 8 + length + first, 8 + length + last)


def _header(file: BufferedReader) -> tuple[int, dict[str, Any]]:
    """The length of a safetensors file's header, and what it says."""
    length = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(length))
    return length, header


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)  # F32, BF16, F8_E4M3, C64, BOOL
    return int(found[0]) if found else 8


def _copy(source: BufferedReader, target: BinaryIO, first: int, last: int) -> None:
    buffer = memoryview(bytearray(min(_CHUNK, last - first)))
    source.seek(first)
    left = last - first
    while left:
        count = source.readinto(buffer[: min(left, _CHUNK)])
        if not count:
            raise OSError("the file ended early: was it changed meanwhile?")
        target.write(buffer[:count])
        left -= count
