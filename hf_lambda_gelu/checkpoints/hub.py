"""`push_relu_to_hub`: save, prove, upload in one commit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but imported there lazily
from torch import Tensor
from transformers import PreTrainedModel

from ..structure.loading import load_saved
from ..structure.scratch import scratch_folder
from ..surgery.report import SubstitutionReport
from .card import CardDetails
from .compression import quantisation
from .manifest import Manifest
from .processors import has_processor
from .save import check_relu, save_relu_pretrained
from .upload import PushError, Upload
from .verify import check_inputs, prove


def push_relu_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    processor: Any = None,
    details: CardDetails | None = None,
    learned: dict[str, float] | None = None,
    history: list[dict[str, Any]] | None = None,
    report: SubstitutionReport | None = None,
    folder: str | os.PathLike[str] | None = None,
    inputs: dict[str, Tensor] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = "Upload ReLU-ized model",
    token: str | None = None,
    api: HfApi | None = None,
    trust_remote_code: bool = False,
) -> CommitInfo:
    """Publishes a ReLU-ized model: saves it, proves by `verify_relu_pretrained` that stock transformers computes the same
    without this package, and only then uploads, in one commit, whose `CommitInfo` it returns. Only what the model's and its
    processor's own saves and this package wrote goes up, and a former network's weights and adapters go: both are named.

    Args:
        model: a model after `relu_ize`, or the folder of one that `save_relu_pretrained` wrote, uploaded as it is.
        repo_id: "owner/name", or "name", of whose token it is.
        processor: tokenizer, image processor or feature extractor, a list for several; `()` for none.
        details, learned, history, report: as for `save_relu_pretrained`; a folder has them. The base's licence is looked up.
        folder: where to keep the saved model; by default a temporary folder, which stays only where the upload failed.
        inputs: a batch for the comparison; by default a small one, as for `verify_relu_pretrained`.
        private: make the repository private or public; by default as its owner has it. An existing one stays as it is.
        revision, tag, create_pr: branch, made if need be; name for the commit, such as "v1"; open a pull request instead.
        commit_message, token, api: by default a plain one, what `hf auth login` saved, the Hub. No token is stored or shown.
        trust_remote_code: run the model's own code to prove it, and upload it; without it such a model is refused.

    Raises:
        ValueError: bad repo id, no token, offline, no processor, no finite ReLU network, code that is not trusted, a card
            with a token in it or that hides quantised weights, inputs that are no tensors.
        VerificationError: stock transformers computes something else. Nothing is uploaded.
        PushError: the upload failed; the folder is kept. Or the model is up and the tag was refused; the message says so.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> hlg.push_relu_to_hub(model, "you/bert-relu", processor=tokenizer).commit_url  # doctest: +SKIP
    """
    api = api or HfApi(token=token)
    check_inputs(inputs)
    check_processor(model, processor)
    repo_id = check_target(api, repo_id, token, tag, create_pr)
    upload = Upload(api, repo_id, token, commit_message, private, revision, tag, create_pr, trust_remote_code)
    if isinstance(model, (str, os.PathLike)):
        _check_alone(processor, details, learned, history, report, folder)
        return upload.set_tag(upload.send(Path(model), _proven(Path(model), inputs, trust_remote_code)))
    with _place_to_save(folder, repo_id) as place:
        save = partial(save_relu_pretrained, processor=processor, model_name=repo_id, learned=learned, history=history)
        details = _licensed(api, details or CardDetails(), token)
        saved = save(model, place, details=details, report=report, trust_remote_code=trust_remote_code)
        commit = upload.send(saved, prove(model, saved, inputs, trust_remote_code).files)
    return upload.set_tag(commit)


def _proven(folder: Path, inputs: dict[str, Tensor] | None, trust_remote_code: bool) -> Manifest:
    """The folder's files, after it was loaded and found to be a ReLU network that stock transformers computes alike."""
    model = load_saved(folder, trust_remote_code=trust_remote_code)
    check_relu(model)
    check_card(folder)
    return prove(model, folder, inputs, trust_remote_code).files


def check_card(folder: Path) -> None:
    """Raises ValueError where weights are quantised and the card does not name the method: nobody would know."""
    quantised, card = quantisation(folder), folder / "README.md"
    if quantised is None:
        return
    method = str(quantised.get("quant_method", ""))
    if card.is_file() and method in card.read_text(encoding="utf-8"):
        return
    told = "its card does not say so" if card.is_file() else "there is no card"
    raise ValueError(
        f"the weights in {str(folder)!r} are quantised ({method}), and {told}: save the model that llm-compressor returns "
        f"by save_relu_pretrained, which writes a card, or say how it was done in a README.md with the word {method} in it"
    )


@contextlib.contextmanager
def _place_to_save(folder: str | os.PathLike[str] | None, repo_id: str) -> Iterator[Path]:
    """The folder to save in. A temporary one, where none is given, outlives the block on a PushError alone."""
    if folder is not None:
        yield Path(folder)
        return
    with scratch_folder(kept_on=(PushError,)) as scratch:  # which names the folder
        yield scratch / repo_id.rpartition("/")[2]


def check_target(api: HfApi, repo_id: str, token: str | None, tag: str | None, create_pr: bool) -> str:
    """The repository's name with its owner's; raises ValueError for what can be known to fail before the model is saved."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"bad repo_id {repo_id!r}: expected 'name' or 'owner/name'. {error}") from error
    if tag is not None and create_pr:
        raise ValueError("tag and create_pr exclude each other: tag the commit once the pull request is merged")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or save_relu_pretrained(model, folder) now and "
            "push the folder later"
        )
    if not (token or api.token or (api.token is None and get_token())):
        raise ValueError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
    if "/" in repo_id:
        return repo_id
    try:
        return f"{api.whoami(token=token)['name']}/{repo_id}"
    except Exception as error:  # refused, or no network
        raise ValueError(f"{repo_id!r} names no owner, and the Hub does not say whose token it is: {error}") from error


def _licensed(api: HfApi, details: CardDetails, token: str | None) -> CardDetails:
    """The details with the licence of the base model, where they name none and the Hub knows it."""
    if details.base_model is None or details.license is not None:
        return details
    try:
        card = api.model_info(details.base_model, token=token).card_data
    except Exception:  # gated, gone, or no network: a card may lack its licence
        return details
    return dataclasses.replace(details, license=card.get("license") if card else None)


def _check_alone(*given: Any) -> None:
    if any(given):
        raise ValueError("a saved folder is uploaded as it is: change its card and files there, and pass it alone")


def check_processor(model: PreTrainedModel | str | os.PathLike[str], processor: Any = None) -> None:
    """Raises ValueError unless one is given, or `model` is a folder with a tokenizer, image or other processor."""
    if processor is not None:
        return
    folder = Path(model) if isinstance(model, (str, os.PathLike)) else None
    if folder is None or not has_processor(folder):
        what = "pass processor=…, its" if folder is None else f"{str(model)!r} holds no"
        raise ValueError(
            f"{what} tokenizer, image processor or feature extractor: without one nobody can run the model by its name. "
            "processor=() publishes it all the same"
        )
