"""A model repository of the stand-in for the Hub: commits, branches, tags and LFS, in memory."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import NamedTuple

LFS_PATTERNS = ("*.bin", "*.safetensors", "*.pt", "*.pth", "*.onnx", "*.h5", "*tfevents*", "*.zip")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class Commit(NamedTuple):
    """One commit of a client: `paths` has deleted ones too, `revision` is the branch it went to."""

    summary: str
    paths: list[str]
    revision: str


class HubError(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass
class Repo:
    """A model repository. The Hub's own first commit (`.gitattributes`) is not in `commits`."""

    repo_id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit id -> every file at that commit
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # paths kept in LFS

    @property
    def files(self) -> dict[str, bytes]:
        """The files at the head of `main`."""
        return self.snapshots[self.branches["main"]]

    def resolve(self, revision: str) -> str:
        """The commit id that a branch, a tag or a commit id names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.snapshots:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        """Make `files` the new head of `branch`."""
        oid = secrets.token_hex(20)
        self.snapshots[oid], self.branches[branch] = files, oid
        return oid

    def oid(self, path: str, data: bytes) -> str:
        """A file's id and ETag: SHA-256 if it is in LFS, else git's blob id."""
        return hashlib.sha256(data).hexdigest() if path in self.lfs else git_oid(data)


def git_oid(data: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes to LFS by its name or size."""
    return size > 10 * 1024**2 or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)
