"""What a repository on the Hub holds before something is pushed to it."""

from __future__ import annotations

from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from transformers.utils import logging

from .stale_files import stale_files

logger = logging.get_logger(__name__)


def files_there(api: HfApi, repo_id: str, revision: str | None, token: str | None) -> list[str]:
    """The files of the branch; one that there is not is made, as transformers does."""
    try:
        return api.list_repo_files(repo_id, revision=revision, token=token)
    except RevisionNotFoundError:
        if revision is None:
            raise
    api.create_branch(repo_id, branch=revision, token=token)
    return api.list_repo_files(repo_id, revision=revision, token=token)


def withdraw_card(api: HfApi, repo_id: str, revision: str | None, token: str | None) -> None:
    """Removes the card of a ReLU network from a repository whose weights are about to be another's; its history keeps it."""
    stale = stale_files(files_there(api, repo_id, revision, token), ()).card
    if not stale:
        return
    api.create_commit(
        repo_id,
        operations=[CommitOperationDelete(name) for name in stale],
        commit_message="Remove the card of the former ReLU network",
        revision=revision,
        token=token,
    )
    logger.warning(
        f"{repo_id} held a ReLU network, and gets other weights now: its card went, and stays in the history: "
        f"{', '.join(stale)}"
    )
