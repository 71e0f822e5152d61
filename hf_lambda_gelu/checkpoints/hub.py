"""`push_relu_to_hub`: save, prove, upload in one commit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel

from ..structure.loading import load_saved
from .card import CardDetails
from .save import check_relu, save_relu_pretrained
from .verify import verify_relu_pretrained


class PushError(RuntimeError):
    """The upload failed. The folder is kept; the message says where it lies and how to go on."""


def push_relu_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    processor: Any = None,
    details: CardDetails | None = None,
    learned: dict[str, float] | None = None,
    history: list[dict[str, Any]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    inputs: dict[str, Tensor] | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload ReLU-ized model",
    token: str | None = None,
    api: HfApi | None = None,
) -> CommitInfo:
    """Publish a ReLU-ized model. Before anything leaves the machine, the saved folder is loaded by stock transformers in a
    process without this package and its outputs are compared with the model's.

    Args:
        model: a model after `relu_ize`, or the folder of one that `save_relu_pretrained` wrote, which is uploaded as it is.
        repo_id: "name" or "owner/name".
        processor: tokenizer, image processor or feature extractor, a list for several; `()` to publish without one.
        details, learned, history: as for `save_relu_pretrained`; not for a folder, which has them. Where the details name a
            base model and no licence, the licence is asked of the Hub.
        folder: where to keep the saved model; by default a temporary folder, removed after the upload succeeded.
        inputs: a batch for the comparison; by default a small one made to fit the model.
        private: create the repository as private; an existing one keeps its visibility.
        revision: branch to commit to.
        tag: name to give the commit, such as "v1".
        create_pr: open a pull request with the commit.
        token: as everywhere in huggingface_hub; by default the one that was saved by `hf auth login`. Never stored or shown.
        api: an `HfApi` of one's own, for another endpoint.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        ValueError: bad repo id, no token, offline mode, no processor, or a model that is not a finite ReLU network.
        VerificationError: stock transformers computes something else. Nothing is uploaded.
        PushError: the upload failed; the folder is kept.
    """
    api = api or HfApi(token=token)
    check_target(api, repo_id, token, tag, create_pr)
    scratch = None
    if processor is None:
        check_processor(model)
    if not isinstance(model, PreTrainedModel):
        if processor or details or learned or history or folder:
            raise ValueError("a saved folder is uploaded as it is: change its card and files there, and pass it alone")
        saved, model = Path(model), load_saved(model)
        check_relu(model)
        verify_relu_pretrained(model, saved, inputs)
    else:
        if folder is None:
            scratch = Path(tempfile.mkdtemp(prefix="relu-model-"))
            folder = scratch / repo_id.rpartition("/")[2]
        try:
            saved = save_relu_pretrained(
                model,
                folder,
                processor=processor,
                details=_licensed(api, details or CardDetails(), token),
                model_name=repo_id,
                learned=learned,
                history=history,
            )
            verify_relu_pretrained(model, saved, inputs)
        except BaseException:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, token=token)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=saved,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, token=token)
    except Exception as error:  # refused, cut off, out of quota …: whatever it is, the work is in the folder
        raise PushError(
            f"the upload to {repo_id} failed: {error}. The model is saved and verified in {str(saved)!r}; to go on: "
            f"hf upload {repo_id} {saved} ."
        ) from error
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    return commit


def check_target(api: HfApi, repo_id: str, token: str | None, tag: str | None, create_pr: bool) -> None:
    """Raises ValueError for what can be known to fail before the model is saved."""
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


def _licensed(api: HfApi, details: CardDetails, token: str | None) -> CardDetails:
    """With the licence of the base model, where they name none and the Hub knows it."""
    if details.base_model is None or details.license is not None:
        return details
    try:
        card = api.model_info(details.base_model, token=token).card_data
    except Exception:  # gated, gone, or no network: a card may lack its licence
        return details
    return dataclasses.replace(details, license=card.get("license") if card else None)


def check_processor(model: PreTrainedModel | str | os.PathLike[str]) -> None:
    """Raises ValueError unless `model` is a folder with a tokenizer, an image processor or a feature extractor."""
    names = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    folder = not isinstance(model, PreTrainedModel)
    if not (folder and any((Path(model) / name).is_file() for name in names)):
        what = f"{str(model)!r} holds no" if folder else "pass processor=…, its"
        raise ValueError(
            f"{what} tokenizer, image processor or feature extractor: without one nobody can run the model by its name. "
            "processor=() publishes it all the same"
        )
