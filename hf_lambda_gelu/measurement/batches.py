"""What goes into a model and comes out of it: the batches of a calibration loader, checked; its main output."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import logging

from ..structure.block_source import device_of
from .batch_faults import input_fault, loader_fault, pads_that_count, shapes, tuple_fault
from .deal import digest, repeated, same_share
from .team import ALONE, Team

logger = logging.get_logger(__name__)


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


def forward_failed(model: nn.Module, index: int, error: Exception, batch: Mapping[str, Any]) -> Exception:
    """The error to raise when the model's forward raised `error` on a calibration batch."""
    if isinstance(error, CalibrationError):
        return error
    return CalibrationError(
        f"calibration batch {index}: {type(model).__name__}.forward raised {type(error).__name__}: {error}. It was given "
        f"{shapes(batch)}"
    )


def model_batches(model: nn.Module, loader: Iterable[Any], team: Team = ALONE) -> Iterator[dict[str, Any]]:
    """The batches of `loader` as keyword arguments: cut to what `model.forward` takes, on the model's device.

    Keys that forward does not take are dropped, as the Trainer does with columns. Labels stay: some models make their
    decoder's input from them. A tensor, or the tensors of a tuple, are forward's first arguments, for modules that are not
    transformers models; what is over (labels) is dropped. A batch for a model that takes one mapping keeps all its keys.

    Args:
        team: of which each process has a loader with its own share. A share may be empty. Its end is a meeting.

    Raises:
        CalibrationError: a batch that holds no tensor that the model takes, or a tuple of more than it needs, or has another
            dtype or device than the first; a loader that is no batches, or yields none, or nothing but padding; of a team
            the same share twice.
    """
    fault = loader_fault(loader)
    if fault is not None:
        raise CalibrationError(fault)
    mapping, accepted = takes_a_mapping(model), accepted_names(model)
    main = getattr(model, "main_input_name", None)
    device = device_of(model)
    first: dict[str, tuple[torch.dtype, torch.device]] = {}
    count, seen, pads, digests = 0, False, 0, list[str]()
    for count, batch in enumerate(loader, 1):
        where = f"calibration batch {count - 1}"
        if main is None and not mapping:
            batch = _named(model, batch, accepted or (), where)
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"{where} is a {type(batch).__name__}: expected a mapping of the model's inputs")
        kept = {name: value for name, value in batch.items() if accepted is None or name in accepted}
        takes = "one mapping with tensors in it" if mapping else repr(main or next(iter(accepted or ()), "nothing"))
        fault = input_fault(model, batch, kept, takes)
        if fault is not None:
            raise CalibrationError(f"{where} {fault}")
        _check_alike(kept, first, where)
        seen = seen or any_token(kept)
        pads += pads_that_count(model, kept, accepted)
        if team.size > 1 and not team.dealt:
            digests.append(digest(kept))
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}
    if pads:
        logger.warning(
            f"{pads} rows of input_ids begin or end with the padding token, and no attention_mask tells: padding counts as "
            "text here. Give the attention_mask that the tokenizer makes"
        )
    shares = team.gathered((count, seen, digests), "the batches of all")
    _check_shares([share for *_, share in shares])
    if not any(count for count, *_ in shares):
        raise CalibrationError(
            "the calibration set yielded no batch: a generator that was consumed before, or an empty loader?"
        )
    if not any(seen for _, seen, _ in shares):
        raise CalibrationError("the calibration set holds only padding: its attention mask is 0 everywhere")


def _named(model: nn.Module, batch: Any, accepted: Sequence[str], where: str) -> Any:
    """A tensor, or the tensors of a tuple, by the names of forward's arguments; CalibrationError if not clear."""
    if not isinstance(batch, (Tensor, tuple, list)):
        return batch
    fault = None if isinstance(batch, Tensor) else tuple_fault(model, batch, accepted)
    if fault is not None:
        raise CalibrationError(f"{where} {fault}")
    return dict(zip(accepted, [batch] if isinstance(batch, Tensor) else batch, strict=False))


def _check_alike(batch: Mapping[str, Any], first: dict[str, tuple[torch.dtype, torch.device]], where: str) -> None:
    """CalibrationError for a tensor of another dtype or device than the `first` of its name, or for a cache."""
    for name, value in batch.items():
        if isinstance(value, Cache):
            raise CalibrationError(f"{where}: {name} is a cache, which grows from run to run. Leave it out of the batch")
        if not isinstance(value, Tensor):
            continue
        dtype, place = first.setdefault(name, (value.dtype, value.device))
        if (value.dtype, value.device) != (dtype, place):
            raise CalibrationError(
                f"{where}: {name} is {value.dtype} on {value.device}, in an earlier batch it was {dtype} on {place}. "
                "Let the loader yield one dtype on one device"
            )


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
    return not isinstance(mask, Tensor) or mask.is_floating_point() or bool(mask.any())  # additive masks are 0 at tokens


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
