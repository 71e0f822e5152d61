"""The file of an ONNX export: appears whole or not at all; is run by onnxruntime; is described."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...structure.claims import Claim
from ...structure.transaction import if_it_fails


def need_onnx(verb: str) -> None:
    """ImportError, saying what to install, unless all three packages are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{verb} needs onnx, onnxscript and onnxruntime ({error}): pip install 'hf_lambda_gelu[onnx]'"
        ) from error


def check_new_file(path: Path) -> None:
    """Raises ValueError unless a file can be made there, with the file of weights that a large model has beside it."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: give the name of a file to make, such as {str(path / 'model.onnx')!r}")
    for file in (path, weights_of(path)):
        if file.exists():
            raise ValueError(f"{str(file)!r} exists: remove it, or give the name of a file to make")


def weights_of(path: Path) -> Path:
    """Where the weights lie that do not fit into the file itself, which holds 2 GiB at most."""
    return path.with_name(path.name + ".data")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the block, a path in a temporary folder beside `path`; what lies there at the end is moved to `path`.

    With it goes its file of weights, if it has one. On an error nothing is left, nor a folder that was made for it.

    Raises:
        ValueError: nothing can be written there.
    """
    claim = Claim(path.parent / f".{path.name}.hf_lambda_gelu-partial")
    new = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    if_it_fails(claim.remove)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            claim.take()
        except BlockingIOError as error:
            raise ValueError(f"another process is making {str(path)!r} just now: choose another name") from error
        except OSError as error:
            raise ValueError(f"cannot write into {str(path.parent)!r}: {error}. Choose another folder") from error
        made = claim.folder / path.name
        yield made
        if weights_of(made).exists():
            os.replace(weights_of(made), weights_of(path))
        try:
            os.replace(made, path)
        except BaseException:
            weights_of(path).unlink(missing_ok=True)
            raise
    finally:
        claim.remove()
        for folder in new:
            with suppress(OSError):  # not empty: the file is there
                folder.rmdir()


def remove(path: Path) -> None:
    """Both files, if they are there."""
    for file in (path, weights_of(path)):
        file.unlink(missing_ok=True)


def session(path: Path, optimised: Path | None = None) -> Any:
    """onnxruntime's session on the CPU.

    Args:
        optimised: where to write the graph that is really run; its weights lie beside it.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised too
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        # the weights beside it, as a file holds 2 GiB at most
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimised.name}.data")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(made: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What a session puts out, as tensors."""
    feed = {item.name: batch[item.name].detach().cpu().numpy() for item in made.get_inputs()}
    return [torch.from_numpy(value) for value in made.run(None, feed)]


def shapes(items: Any) -> dict[str, tuple[int | str, ...]]:
    """Of a session's inputs or outputs: name → sizes, a word where a size may change."""
    return {item.name: tuple(item.shape) for item in items}


def operators(path: Path) -> dict[str, int]:
    """How often each operator is in the file, in branches and functions too; the most frequent first."""
    import onnx

    file = onnx.load(str(path), load_external_data=False)
    waiting, counts = [file.graph, *file.functions], Counter[str]()
    for block in waiting:
        counts.update(node.op_type for node in block.node)
        waiting += [item.g for node in block.node for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    return dict(counts.most_common())


def size_of(path: Path) -> int:
    """Bytes, with the file of weights."""
    return sum(file.stat().st_size for file in (path, weights_of(path)) if file.exists())
