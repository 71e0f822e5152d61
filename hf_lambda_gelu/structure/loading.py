"""Loads the model of a checkpoint folder: with its weights, or without them on the meta device."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from .._compat import generation_config_in_config
from ..activation.module import hardness_sites
from ..activation.older_checkpoints import NAME
from .own_code import own_model_class, refusal

_COUNTED = re.compile("^(?!.*theta).*(layer|block|depth|expert)")  # not layer_rope_theta, which is a wavelength
_MOST = 10_000  # of layers, or of experts in one: no network has as many


class CheckpointError(ValueError):
    """A folder is no checkpoint that can be worked on; the message says what was seen and what to do.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> try:
        ...     hlg.convert_checkpoint("no/such/folder", "out")
        ... except hlg.CheckpointError as error:
        ...     print(str(error)[:35])
        there is no folder 'no/such/folder'
    """


def check_trusted(folder: Path, trust_remote_code: bool) -> None:
    """CheckpointError where loading the folder would run code of its own and the caller has not said that it may, or where
    that code lies elsewhere. Stands before whatever reads the folder by transformers; nothing is imported, nobody asked."""
    reason = refusal(folder, trust_remote_code)
    if reason is not None:
        raise CheckpointError(reason)


def saved_class(
    folder: Path, otherwise: type[PreTrainedModel] | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config of a checkpoint folder, and the class that it names; `otherwise` where transformers has no such class.

    Args:
        trust_remote_code: code that lies in the folder may run; it makes config and class, then, where the folder says so.

    Raises:
        CheckpointError: not a checkpoint folder, or of a class that the installed transformers lacks; code of its own that
            is not trusted.
    """
    if not folder.exists():
        raise CheckpointError(
            f"there is no folder {str(folder)!r}. For a model on the Hub, huggingface_hub.snapshot_download(name) makes one"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is a file: pass the folder that it lies in")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{str(folder)!r} holds no config.json: expected the folder of a saved checkpoint")
    check_trusted(folder, trust_remote_code)
    with checkpoint_errors(f"{str(folder / CONFIG_NAME)!r} makes no config"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        _check_counts(config)
        name = (config.architectures or ["none"])[0]
        own = own_model_class(folder, config) if trust_remote_code else None
        cls = own[1] if own else getattr(transformers, name, otherwise)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) and cls is not otherwise:
        cls = None
    if cls is None:
        raise CheckpointError(f"config.json names the class {name!r}, which transformers {transformers.__version__} lacks")
    return config, cls


@contextmanager
def checkpoint_errors(what: str) -> Iterator[None]:
    """Within the block, whatever a library makes of a damaged file is a CheckpointError that says `what` fails, and why."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise CheckpointError(f"{what}: {type(error).__name__}: {reason}") from error


def _check_counts(config: PreTrainedConfig) -> None:
    """CheckpointError for a config that would build for hours."""
    for key, value in config.to_dict().items():
        counts = value if isinstance(value, list) else [value]
        for count in counts if _COUNTED.search(key) else ():
            if isinstance(count, (int, float)) and count > _MOST:
                raise CheckpointError(f"{CONFIG_NAME} has {key} = {value!r}: expected at most {_MOST:,}")


def load_saved(
    folder: str | os.PathLike[str],
    *,
    otherwise: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads the model of a checkpoint folder, in eval mode, by the class that its config names.

    The one way in which the package loads a folder: nothing comes from a network, and no code of the folder runs unless it
    is trusted.

    Args:
        folder: what `save_pretrained` wrote.
        otherwise: the class to load (`AutoModel`) where the config names none, or one that the installed transformers lacks.
        trust_remote_code: run code that lies in the folder, where its files name it.

    Raises:
        CheckpointError: not a checkpoint folder, of a class that the installed transformers lacks, with weights that are
            missing or do not fit, or with code of its own that is not trusted.
    """
    config, cls = saved_class(Path(folder), otherwise, trust_remote_code=trust_remote_code)
    expected = "expected a folder with config.json and weights, as save_pretrained writes it"
    with checkpoint_errors(f"{cls.__name__} does not load {str(folder)!r}, {expected}"):
        loaded: Any = cls.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model: PreTrainedModel = loaded[0]
    if cls is not otherwise:  # a part of a network lacks what is not its own
        _check_complete(Path(folder), model, loaded[1]["missing_keys"])
    return model


def _check_complete(folder: Path, model: PreTrainedModel, missing: Collection[str]) -> None:
    """CheckpointError if weights are missing, but for λ, which is 1 where a checkpoint of a smooth model has none."""
    hardness = {f"{name}.{NAME}" for name in hardness_sites(model)}
    lost = sorted(set(missing) - hardness)
    if lost:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(lost)} tensors of {type(model).__name__}, {lost[0]} the first of them: they would "
            "be drawn at random. Fetch it again, or load the model, see to these weights, and save_pretrained"
        )


def load_without_reading(
    folder: Path, config: PreTrainedConfig, cls: type[PreTrainedModel], tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The model as from_pretrained makes it, with tensors that have names and shapes only, or that are views of files.

    Args:
        tensors: those of the checkpoint, all on the meta device, or all on the CPU, which then are not copied.

    Raises:
        CheckpointError: config and tensors do not fit.
    """
    quantised = config.__dict__.pop("quantization_config", None)  # its modules are not needed, nor is a GPU for them
    with checkpoint_errors(f"{cls.__name__} does not load {str(folder)!r}"), quietly():
        loaded: Any = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            device_map={"": "meta"} if any(tensor.is_meta for tensor in tensors.values()) else None,
            ignore_mismatched_sizes=quantised is not None,
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
    if quantised is None:
        _check_complete(folder, model, loaded[1]["missing_keys"])
    else:
        model.config.quantization_config = quantised
    if model.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        with checkpoint_errors(f"{str(folder / GENERATION_CONFIG_NAME)!r} makes no generation config"):
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    elif model.can_generate():
        # an old checkpoint has the settings in config.json, which is rewritten without them
        with checkpoint_errors(f"{str(folder / CONFIG_NAME)!r} makes no generation config"):
            model.generation_config = generation_config_in_config(folder, CONFIG_NAME)
    return model


def save_parts(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """save_pretrained with these tensors of the state dict alone, which are not kept in a file.

    Returns:
        The tensors, under the names that a checkpoint has for them.
    """
    with quietly():
        model.save_pretrained(folder, state_dict=dict(tensors))
    path = folder / SAFE_WEIGHTS_NAME
    saved = load_file(path) if path.is_file() else {}
    path.unlink(missing_ok=True)
    return saved


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and load report: they would be about tensors without data."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
