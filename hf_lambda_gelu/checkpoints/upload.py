"""A proven folder goes to the Hub: its files in one commit, in the place of a former network's, and a tag."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils import logging

from .card import REPORT_NAME
from .manifest import FileEntry, Manifest
from .processors import has_processor
from .published_files import published_files
from .repository import files_there
from .stale_files import stale_files
from .stock_process import VerificationError

logger = logging.get_logger(__name__)

_IN_MEMORY = 10 << 20  # bytes; larger files are weights, whose SHA-256 the Hub checks


class PushError(RuntimeError):
    """The upload failed, or its tag. The message says what is done, where the folder lies, and how to go on.

    Examples:
        >>> try:  # doctest: +SKIP
        ...     hlg.push_relu_to_hub(model, "you/bert-relu", processor=tokenizer)
        ... except hlg.PushError as error:
        ...     print(error)
    """


@dataclass(frozen=True)
class Upload:
    """Where a saved folder goes, and as what."""

    api: HfApi
    repo_id: str
    token: str | None = field(repr=False)  # in no traceback
    commit_message: str | None
    private: bool | None
    revision: str | None
    tag: str | None
    create_pr: bool
    trust_remote_code: bool

    def send(self, folder: Path, proven: Manifest) -> CommitInfo:
        """Uploads the folder's `published_files` in one commit: the bytes that were proven.

        Raises:
            VerificationError: a file is another by now.
            PushError: the upload failed, whatever the reason is.
        """
        files = published_files(folder, self.trust_remote_code)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*_operations(folder, files.names, proven)]
        if files.left_out:
            logger.warning(f"Not uploaded of {str(folder)!r}: {files}")
        try:
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True, token=self.token)
            stale = stale_files(self._files_there(), files.names)
            operations += [CommitOperationDelete(name) for name in stale.loaded + stale.card]
            commit = self.api.create_commit(  # upload_folder may make several
                repo_id=self.repo_id,
                operations=operations,
                commit_message=self.commit_message or "Upload ReLU-ized model",
                revision=self.revision,
                create_pr=self.create_pr,
                token=self.token,
            )
        except Exception as error:  # refused, cut off, out of quota …: whatever it is, the work is in the folder
            raise PushError(
                f"the upload to {self.repo_id} failed: {error}. The model is saved and verified in {str(folder)!r}; to go "
                f"on: {shlex.join(self.command(folder))}" + (f". Not for upload: {files}" if files.left_out else "")
            ) from error
        if str(stale):
            logger.warning(f"{self.repo_id} held another network. {stale}")
        return commit

    def _files_there(self) -> list[str]:
        """What the branch holds now; a pull request needs one that is there."""
        if self.create_pr:
            return self.api.list_repo_files(self.repo_id, revision=self.revision, token=self.token)
        return files_there(self.api, self.repo_id, self.revision, self.token)

    def set_tag(self, commit: CommitInfo) -> CommitInfo:
        """Gives the commit its tag, if it is to have one; PushError, which says that the model is up, where that fails."""
        try:
            if self.tag is not None:
                self.api.create_tag(self.repo_id, tag=self.tag, revision=commit.oid, token=self.token)
        except Exception as error:
            command = ["hf", "repos", "tag", "create", self.repo_id, self.tag or "", "--revision", commit.oid]
            raise PushError(
                f"the model is uploaded to {self.repo_id}, as {commit.commit_url}, but the tag {self.tag!r} was not set: "
                f"{error}. To set it: {shlex.join(command)}"
            ) from error
        return commit

    def command(self, folder: Path) -> list[str]:
        """What uploads the folder another time: the same files, to the same place."""
        options = [*(["--private"] if self.private else []), *(["--create-pr"] if self.create_pr else [])]
        options += [f"--{name}={value}" for name, value in (("revision", self.revision), ("tag", self.tag)) if value]
        options += [] if has_processor(folder) else ["--no-processor"]
        options += ["--trust-remote-code"] if self.trust_remote_code else []
        return ["hf-lambda-gelu", "push", str(folder), "--repo-id", self.repo_id, *options]


def _operations(folder: Path, names: list[str], proven: Manifest) -> list[CommitOperationAdd]:
    """The files as the Hub's client sends them, each with the size and SHA-256 that was proven."""
    operations = []
    for name in names:
        path = folder / name
        small = path.stat().st_size <= _IN_MEMORY  # sent as it is read now
        operation = CommitOperationAdd(name, path.read_bytes() if small else str(path))
        info = operation.upload_info
        if name != REPORT_NAME and proven.get(name) != FileEntry(size=info.size, sha256=info.sha256.hex()):
            raise VerificationError(f"{str(path)!r} was changed after the proof: nothing was uploaded. Push it once more")
        operations.append(operation)
    return operations
