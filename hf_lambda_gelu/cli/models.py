"""From a folder or a Hub name to a folder on disk, a model in memory, and what prepares its inputs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .work import UsageError, WorkFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]
# other frameworks' copies of the weights, and what needs none of them
_UNUSED = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.gguf", "*.mlmodel"]
_UNUSED += ["onnx/*", "openvino/*", "coreml/*", "original/*"]


def resolved(name: str) -> Path:
    """The folder of that name, or the snapshot of the model on the Hub, downloaded into the Hub's cache.

    Raises:
        UsageError: neither a folder nor a model.
        WorkFailed: the Hub cannot be reached, or the download broke off.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name!r} holds no config.json: expected the folder of a saved checkpoint")
        return path
    if path.is_file():
        raise UsageError(f"{name!r} is a file: pass the folder that it lies in")
    if not is_hub_name(name):
        raise UsageError(f"there is no folder {name!r}, and a Hub name is 'name' or 'owner/name'")
    folder = _snapshot(name, [*_UNUSED, *_PICKLES])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, _UNUSED)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name!r} on the Hub holds no config.json: it is no model of transformers")
    return folder


def is_hub_name(name: str) -> bool:
    """Whether a model on the Hub could be called so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _snapshot(name: str, ignored: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise UsageError(f"{name!r} is gated: ask for access on its page on the Hub, and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"there is no folder {name!r}, and no model of that name on the Hub: check the name; for a private model run "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise UsageError(
                f"there is no folder {name!r}, and no such model in the cache; HF_HUB_OFFLINE is set: unset it to download"
            ) from error
        raise WorkFailed(f"there is no folder {name!r}, and the Hub cannot be reached: {error}") from error
    except Exception as error:  # whatever a network can do
        raise WorkFailed(
            f"the download of {name!r} broke off: {type(error).__name__}: {error}. The same command again goes on where "
            "it stopped"
        ) from error


def loaded(folder: Path, trust_remote_code: bool = False, device: str = "cpu", as_llama: bool = False) -> PreTrainedModel:
    """The model by the class that its config names, or the Llama of the same function.

    Raises:
        WorkFailed: it does not load.
        ValueError: it is no Llama's function.
    """
    import hf_lambda_gelu as hlg

    from .inner import load_saved

    try:
        model = load_saved(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise WorkFailed(f"no model could be loaded from {str(folder)!r}: {error}") from error
    model = hlg.as_llama(model) if as_llama else model
    try:
        return model.to(device)  # type: ignore[arg-type, no-any-return]
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model cannot go to the device {device!r}: {error}") from error


def without_weights(folder: Path, target: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device, for those who ask what it takes: `target` is to be made of it."""
    from .inner import Source

    return Source(folder, target, trust_remote_code=trust_remote_code).load()


def with_hardness(model: PreTrainedModel) -> PreTrainedModel:
    """The model, converted at λ = 1 if it has no λ-GELU: the same function."""
    import hf_lambda_gelu as hlg

    if not hlg.hardness_sites(model):
        hlg.convert(model)
    return model


def processors(folder: Path, trust_remote_code: bool = False) -> list[Any]:
    """The tokenizer, image processor and feature extractor that the folder holds; or the processor that is all of them.

    Raises:
        CheckpointError: one has code of its own that is not trusted.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    from .inner import check_trusted, references

    check_trusted(folder, trust_remote_code)
    if trust_remote_code and any(reference.auto == "AutoProcessor" for reference in references(folder)):
        return [AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)]  # of code of its own
    found: list[Any] = []
    if any((folder / name).is_file() for name in _TOKENIZER):
        found.append(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    if (folder / "preprocessor_config.json").is_file():
        for auto in (AutoImageProcessor, AutoFeatureExtractor):
            try:
                found.append(auto.from_pretrained(folder, trust_remote_code=trust_remote_code))  # type: ignore[no-untyped-call]
                break
            except (ValueError, OSError):  # of the other kind
                continue
    return found


def writable(name: str, folder: Path, scratch: Path) -> Path:
    """`folder`, if it is the user's; of the Hub's cache, which must stay as it is, a copy in `scratch`, weights linked."""
    if Path(name).expanduser().is_dir():
        return folder

    def put(source: str, target: str) -> None:
        real = os.path.realpath(source)
        if source.endswith(".safetensors"):
            os.symlink(real, target)
        else:
            shutil.copyfile(real, target)

    return Path(shutil.copytree(folder, scratch / folder.name, copy_function=put))
