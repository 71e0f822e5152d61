"""What goes into a model and comes out of it: the batches of a calibration loader, checked; its main output."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..structure.block_source import device_of
from .deal import digest, repeated, same_share
from .team import ALONE, Team
from .towers import decoder_mask


class CalibrationError(ValueError):
    """The calibration set cannot be used; the message says what was got and what to do. The model is as it was.

    Examples:
        >>> try:
        ...     hlg.calibrate(model, [])  # import hf_lambda_gelu as hlg; a converted model
        ... except hlg.CalibrationError as error:
        ...     print(error)  # the calibration set yielded no batch: …
    """


_MAPPING = re.compile(r"(typing\.|collections\.abc\.)?([Dd]ict|(Mutable)?Mapping)\b")
# what a forward raises when its input does not fit; out of memory is a RuntimeError too
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


def forward_failed(model: nn.Module, index: int, error: Exception) -> Exception:
    """The error to raise when the model's forward raised `error` on a calibration batch."""
    if isinstance(error, CalibrationError):
        return error
    return CalibrationError(
        f"calibration batch {index}: {type(model).__name__}.forward raised {type(error).__name__}: {error}"
    )


def model_batches(model: nn.Module, loader: Iterable[Any], team: Team = ALONE) -> Iterator[dict[str, Any]]:
    """The batches of `loader` as keyword arguments: cut to what `model.forward` takes, on the model's device.

    Keys that forward does not take are dropped, as the Trainer does with columns. Labels stay: some models make their
    decoder's input from them. A tensor, or the tensors of a tuple, are forward's first arguments, for modules that are not
    transformers models; what is over (labels) is dropped. A batch for a model that takes one mapping keeps all its keys.

    Args:
        team: of which each process has a loader with its own share. A share may be empty. Its end is a meeting.

    Raises:
        CalibrationError: a batch that holds no tensor that the model takes, or has another dtype or device than the first;
            a loader that yields nothing, or nothing but padding; of a team the same share twice.
    """
    mapping, accepted = takes_a_mapping(model), accepted_names(model)
    main = getattr(model, "main_input_name", None)
    device = device_of(model)
    first: dict[str, tuple[torch.dtype, torch.device]] = {}
    count, seen, digests = 0, False, list[str]()
    for count, batch in enumerate(loader, 1):
        where = f"calibration batch {count - 1}"
        if main is None and not mapping and isinstance(batch, (Tensor, tuple, list)):
            batch = dict(zip(accepted or (), [batch] if isinstance(batch, Tensor) else batch, strict=False))
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"{where} is a {type(batch).__name__}: expected a mapping of the model's inputs")
        kept = {name: value for name, value in batch.items() if accepted is None or name in accepted}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        if not any(value.numel() for name, value in tensors.items() if name != "labels"):
            takes = repr(main or next(iter(accepted or ()), "nothing"))
            takes = "one mapping with tensors in it" if mapping else takes
            raise CalibrationError(
                f"{where} holds {', '.join(map(repr, batch)) or 'nothing'}: no tensor in it is an input of "
                f"{type(model).__name__}.forward, which takes {takes}"
            )
        for name, value in tensors.items():
            dtype, place = first.setdefault(name, (value.dtype, value.device))
            if (value.dtype, value.device) != (dtype, place):
                raise CalibrationError(
                    f"{where}: {name} is {value.dtype} on {value.device}, in an earlier batch it was {dtype} on {place}. "
                    "Let the loader yield one dtype on one device"
                )
        for name, value in kept.items():
            if isinstance(value, Cache):
                raise CalibrationError(f"{where}: {name} is a cache, which grows from run to run. Leave it out of the batch")
        seen = seen or any_token(kept)
        if team.size > 1 and not team.dealt:
            digests.append(digest(kept))
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}
    shares = team.gathered((count, seen, digests), "the batches of all")
    _check_shares([share for *_, share in shares])
    if not any(count for count, *_ in shares):
        raise CalibrationError(
            "the calibration set yielded no batch: a generator that was consumed before, or an empty loader?"
        )
    if not any(seen for _, seen, _ in shares):
        raise CalibrationError("the calibration set holds only padding: its attention mask is 0 everywhere")


def check_dealt(loader: Iterable[Any], team: Team) -> None:
    """CalibrationError if the shares are made even by examples that are repeated, which would count twice."""
    more = repeated(loader) if team.size > 1 else 0
    if more:
        raise CalibrationError(
            f"the calibration set repeats {more} of its examples, so that all processes have as many batches: these would "
            "count twice. With accelerate: Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)); else "
            "deal out the batches, batches[rank::size]"
        )


def _check_shares(digests: Sequence[Sequence[str]]) -> None:
    """CalibrationError if a process has no batch that another one has not: then nothing was dealt out."""
    found = same_share(digests)
    if found is not None:
        raise CalibrationError(
            f"process {found[1]} has no calibration batch that process {found[0]} has not, so that they would count twice: "
            "with processes='all' each process passes its own share, such as batches[rank::size], or what "
            "Accelerator.prepare makes of a loader; where all have the same batches, processes='one'"
        )


def takes_a_mapping(model: nn.Module) -> bool:
    """Whether forward takes the whole batch as one mapping, which its annotation says: `SentenceTransformer` does."""
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return len(parameters) == 1 and _MAPPING.match(inspect.formatannotation(parameters[0].annotation).strip("'")) is not None


def accepted_names(model: nn.Module) -> list[str] | None:
    """The names of forward's arguments, in order; None if it takes any."""
    if takes_a_mapping(model):
        return None
    parameters = inspect.signature(model.forward).parameters
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n != "return_dict"]
    wraps = getattr(model, "get_base_model", None)  # PEFT passes on whatever it is given
    if wraps is not None:
        names += accepted_names(wraps()) or []
    elif not names and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return names


def any_token(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has anything but padding in it."""
    mask = batch.get("attention_mask")
    return not isinstance(mask, Tensor) or bool(mask.any())


def token_mask(batch: Mapping[str, Any], decoder: bool = False) -> Tensor | None:
    """(batch, length), True at tokens that are not padding; None if the batch does not say.

    Args:
        decoder: of the decoder's input of an encoder-decoder model; see `towers.decoder_mask`.
    """
    if decoder:
        return decoder_mask(None, batch)
    mask = batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(…, features) as (rows, features), without the rows of padding where the mask fits the tensor's leading shape.

    It does not fit where a model works on something other than tokens (image patches, or sequences that it unpadded
    itself): then every row counts.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    if mask is None or bool(mask.all()):
        return flat
    if tensor.shape[:-1] == mask.shape or (tensor.dim() == 2 and len(flat) == mask.numel()):
        return flat[mask.reshape(-1).to(flat.device)]
    return flat


def batch_size(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds: labels, or else the main input, or else the first tensor.

    Patches of several images in one matrix are told apart by the sizes that come with them.
    """
    main = getattr(model, "main_input_name", "")  # OneFormer has a list of them
    grid = batch.get("grid_thw", batch.get("image_grid_thw")) if main == "pixel_values" else None
    if isinstance(grid, Tensor) and grid.dim() == 2:
        return max(1, len(grid))
    named = [batch.get(name) for name in ("labels", *([main] if isinstance(main, str) else main))] + list(batch.values())
    return next((max(1, len(value)) for value in named if isinstance(value, Tensor) and value.dim()), 1)
