"""A stand-in for the Hugging Face Hub on 127.0.0.1: standard library and PyYAML, everything in memory, faults on demand.

It speaks what `huggingface_hub` 2.x and `transformers` 5.x use to publish a model and to load it again: model
repositories, plain LFS, no Xet. The client reads HF_ENDPOINT when it is imported, so it runs in a subprocess with
`hub.env(home)`. In this process only `HfApi(endpoint=hub.url, token=...)` works, and none of the card functions.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.bin", "*.safetensors", "*.pt", "*.pth", "*.onnx", "*.h5", "*tfevents*", "*.zip")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class Request(NamedTuple):
    """One request as answered: `path` is unquoted and has no query, `status` 0 is a dropped connection."""

    method: str
    path: str
    status: int


class Commit(NamedTuple):
    """One commit of a client: `paths` has deleted ones too, `revision` is the branch it went to."""

    summary: str
    paths: list[str]
    revision: str


@dataclass
class Collection:
    """A collection of repositories."""

    title: str
    private: bool
    items: list[str] = field(default_factory=list)


class HubError(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


class Reply(NamedTuple):
    """A good answer; a body that is not bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


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


class Fault(NamedTuple):
    """An injected failure, see `HubServer.fail_next`."""

    method: str
    path_regex: str
    status: int
    applied: bool
    headers: dict[str, str]


ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Reply]]] = []


def route(method: str, pattern: str, public: bool = False) -> Callable[[Any], Any]:
    """Register a handler: {repo} is a repository id, {other} one path segment. All but GET need the token."""
    regex = re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern.replace("{repo}", "(?P<repo>[^/]+(?:/[^/]+)?)"))

    def register(handler: Any) -> Any:
        ROUTES.append((method, re.compile(regex), public or method == "GET", handler))
        return handler

    return register


class HubServer:
    """`with HubServer() as hub:` gives `url`, `env()`, `repos`, `requests`, `fail_next()` and `add_repo()`."""

    def __init__(self, token: str = "hf_test", user: str = "tester") -> None:
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collection] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self._signatures: dict[str, str] = {}  # of upload addresses -> SHA-256
        self._lock = threading.RLock()
        self._http = _Http(("127.0.0.1", 0), type("Call", (Call,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self._xet_before = _disable_xet("1")  # uploads of this process would go to hf_xet, where that is installed
        return self

    def __exit__(self, *_: object) -> None:
        _disable_xet(self._xet_before)
        self._http.shutdown()
        self._http.server_close()

    def env(self, cache_dir: str | Path) -> dict[str, str]:
        """The environment of a client process: this one's, its Hub settings replaced."""
        hub_prefixes = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(hub_prefixes)}
        env |= {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(cache_dir), "HF_HUB_DISABLE_XET": "1"}
        return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def fail_next(
        self, method: str, path_regex: str, status: int, times: int = 1, applied: bool = True, retry_after: int = 0
    ) -> None:
        """Fail the next `times` requests of `method` in whose unquoted path `path_regex` is found.

        Status 0 drops the connection in mid-answer: after the request took effect, or before (`applied=False`).
        With any other status it takes no effect. 429 and 503 name `retry_after`; the client waits a second longer.
        """
        headers = {"Retry-After": str(retry_after)} if status in (429, 503) else {}
        headers |= {"RateLimit": f'"api";r=0;t={retry_after}'} if status == 429 else {}
        headers |= {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
        self._faults += [Fault(method, path_regex, status, applied, headers)] * times

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Create a repository, as `create_repo` does, but without a request."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.lfs = {path for path, data in (files or {}).items() if is_lfs(path, len(data))}
        repo.add("main", {".gitattributes": ATTRIBUTES} | (files or {}))
        return repo

    def answer(self, call: Call) -> tuple[Reply, bool]:
        """Answer and record a request; the second value says to drop the connection half-way."""
        path = unquote(call.path)
        with self._lock:
            hits = (f for f in self._faults if f.method == call.command and re.search(f.path_regex, path))
            fault = next(hits, None)
            try:
                if fault:
                    self._faults.remove(fault)
                if fault and (fault.status or not fault.applied):
                    status = fault.status or 500
                    raise HubError(status, f"injected: {HTTPStatus(status).phrase}", headers=fault.headers)
                reply = self._dispatch(call)
            except HubError as error:
                reply = Reply({"error": str(error)}, error.status, error.headers)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a malformed request
                traceback.print_exc()
                reply = Reply({"error": f"hub_server cannot read this: {error!r}"}, 400)
            dropped = fault is not None and fault.status == 0
            self.requests.append(Request(call.command, path, 0 if dropped else reply.status))
        return reply, dropped

    def _dispatch(self, call: Call) -> Reply:
        """Check the token, then call the handler."""
        sent = call.headers.get("Authorization")
        if sent not in (None, f"Bearer {self.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        for method, regex, public, handler in ROUTES:
            match = regex.fullmatch(call.path)
            if match and method == call.command.replace("HEAD", "GET"):
                if not public and sent is None:
                    raise HubError(401, "Invalid username or password.")
                names: dict[str, Any] = {name: unquote(value) for name, value in match.groupdict("").items()}
                if "repo" in names:
                    names["repo"] = self._find(names["repo"], known=sent is not None)
                return handler(self, call, **names)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _find(self, repo_id: str, known: bool) -> Repo:
        """The repository if it exists and is to be seen; like the Hub, strangers are told 401 either way."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not known):
            raise HubError(404 if known else 401, "Repository not found", "RepoNotFound")
        return repo

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Reply:
        if "Authorization" not in call.headers:
            raise HubError(401, "Invalid username or password.")
        return Reply({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    @route("POST", "/api/validate-yaml", public=True)
    def _validate(self, call: Call) -> Reply:
        errors, warnings = check_card(call.json()["content"])
        status = 400 if errors else 200
        if call.headers.get("Accept") == "text/plain":
            return Reply("\n".join(errors).encode(), status, {"Content-Type": "text/plain"})
        found = {"errors": errors, "warnings": warnings}
        return Reply({kind: [{"message": text} for text in texts] for kind, texts in found.items()}, status)

    @route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Reply:
        asked = call.json()
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if asked.get("type", "model") != "model":
            raise HubError(400, "this stand-in holds models only")
        about = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return Reply(about | {"error": "You already created this model repo"}, 409)
        self.add_repo(repo_id, private=asked.get("visibility") == "private")
        return Reply(about)

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def _preupload(self, call: Call, repo: Repo, rev: str) -> Reply:
        head, answer = repo.snapshots[repo.resolve(rev)], []
        for file in call.json()["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) or b"\0" in base64.b64decode(file["sample"]) else "regular"
            known = repo.oid(path, head[path]) if path in head else None  # the client leaves unchanged files out
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return Reply({"files": answer})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call, repo: Repo) -> Reply:
        objects = [{"oid": item["oid"], "size": item["size"]} for item in call.json()["objects"]]
        for item in objects:
            if item["oid"] not in self._blobs:  # what is here already is not asked for again
                signature = secrets.token_hex(8)
                self._signatures[signature] = item["oid"]
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}?signature={signature}"}}
        return Reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/{oid}", public=True)
    def _lfs_put(self, call: Call, oid: str) -> Reply:
        if self._signatures.get(call.query.get("signature", [""])[0]) != oid:
            raise HubError(403, "SignatureDoesNotMatch")
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "BadDigest")
        self._blobs[oid] = call.body
        return Reply()

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def _commit(self, call: Call, repo: Repo, rev: str) -> Reply:
        head = repo.resolve(rev)
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        if header["key"] != "header" or not header["value"].get("summary") or rev not in repo.branches:
            raise HubError(400, "a commit needs a branch and starts with a header that has a summary")
        if header["value"].get("parentCommit", head) != head:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(repo.snapshots[head]), set(repo.lfs)
        for key, value in ((line["key"], line["value"]) for line in operations):
            path = value["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"], validate=True)
                lfs.discard(path)
            elif key == "lfsFile":
                if value["oid"] not in self._blobs:
                    raise HubError(400, f"the LFS object of {path} was not uploaded")
                files[path] = self._blobs[value["oid"]]
                lfs.add(path)
            elif key in ("deletedFile", "deletedFolder"):
                inside = path.rstrip("/") + "/" if key == "deletedFolder" else None
                gone = [name for name in files if (name.startswith(inside) if inside else name == path)]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {name: data for name, data in files.items() if name not in gone}
            else:
                raise HubError(400, f"unknown operation {key}")
        if errors := check_card(files.get("README.md", b"").decode())[0]:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        repo.lfs = lfs
        repo.commits.append(Commit(header["value"]["summary"], [line["value"]["path"] for line in operations], rev))
        oid = repo.add(rev, files)
        return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo.repo_id}/commit/{oid}"})

    @route("POST", "/api/models/{repo}/(?P<kind>tag|branch)/{name}")
    def _new_ref(self, call: Call, repo: Repo, kind: str, name: str) -> Reply:
        asked = call.json()  # a tag's address names what is tagged, a branch's address the new branch
        refs, new = (repo.tags, asked["tag"]) if kind == "tag" else (repo.branches, name)
        if new in refs:
            raise HubError(409, f"Reference already exists: {new}")
        refs[new] = repo.resolve(name if kind == "tag" else asked.get("startingPoint", "main"))
        return Reply({})

    @route("POST", "/api/collections")
    def _new_collection(self, call: Call) -> Reply:
        asked = call.json()
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        if slug in self.collections:
            return Reply({"error": "exists", "slug": slug}, 409)
        self.collections[slug] = Collection(asked["title"], asked.get("private", False))
        return self._collection(call, slug)

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def _new_item(self, call: Call, slug: str) -> Reply:
        item = call.json()["item"]
        if item["id"] not in self.repos:
            raise HubError(404, "no such repository")
        if item["id"] in self.collections[slug].items:
            raise HubError(409, "Item is in the collection already")
        self.collections[slug].items.append(item["id"])
        return self._collection(call, slug)

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def _collection(self, call: Call, slug: str) -> Reply:
        found = self.collections[slug]
        items = [{"_id": str(n), "id": i, "type": "model", "position": n} for n, i in enumerate(found.items)]
        about = {"slug": slug, "title": found.title, "private": found.private, "items": items, "owner": {"name": self.user}}
        about |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
        return Reply(about)

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/(?P<folder>.+))?")
    def _tree(self, call: Call, repo: Repo, rev: str, folder: str) -> Reply:
        oid, start = repo.resolve(rev), len(folder) + 1 if folder else 0
        recursive = call.query.get("recursive", ["false"])[0].lower() == "true"
        listing: dict[str, dict[str, Any]] = {}
        for path, data in repo.snapshots[oid].items():
            if path[:start] == folder + "/" * bool(folder):
                parents = [path[: slash.start()] for slash in re.finditer("/", path) if slash.start() > start]
                for parent in parents if recursive else parents[:1]:
                    listing[parent] = {"type": "directory", "path": parent, "oid": git_oid(parent.encode())}
                if recursive or not parents:
                    listing[path] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
                    if path in repo.lfs:
                        listing[path]["lfs"] = {"oid": repo.oid(path, data), "size": len(data), "pointerSize": 134}
        if folder and not listing:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", headers={"X-Repo-Commit": oid})
        return Reply(list(listing.values()))

    @route("GET", "/{repo}/resolve/{rev}/(?P<path>.+)")
    def _resolve(self, call: Call, repo: Repo, rev: str, path: str) -> Reply:
        oid = repo.resolve(rev)
        data = repo.snapshots[oid].get(path)
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": oid})
        return Reply(data, 200, {"X-Repo-Commit": oid, "ETag": f'"{repo.oid(path, data)}"'})

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def _info(self, call: Call, repo: Repo, rev: str) -> Reply:
        oid = repo.resolve(rev or "main")
        siblings = [{"rfilename": path} for path in repo.snapshots[oid]]
        names = {"id": repo.repo_id, "modelId": repo.repo_id, "author": repo.repo_id.split("/")[0], "tags": []}
        front = repo.snapshots[oid].get("README.md", b"").decode().split("---\n")
        card = yaml.safe_load(front[1]) if len(front) > 2 else {}
        names |= {key: card[key] for key in ("pipeline_tag", "library_name", "tags") if key in card} | {"cardData": card}
        return Reply(names | {"sha": oid, "private": repo.private, "siblings": siblings})


class Call(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer it, writes the answer or half of it."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.path, self.query = url.path, parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        (body, status, headers), dropped = self.hub.answer(self)
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {**headers, "Content-Type": "application/json"}
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace")
        body = b"" if self.command == "HEAD" else body
        if dropped:
            head, body = head if body else head[:10], body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(head + body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def json(self) -> Any:
        """The body, from JSON."""
        return json.loads(self.body)

    def handle(self) -> None:
        """Serve one connection; a client that hangs up is no mistake."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Http(ThreadingHTTPServer):
    """Takes many connections at once, and leaves idle ones behind when it ends."""

    request_queue_size = 64
    block_on_close = False


def git_oid(data: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes to LFS by its name or size."""
    return size > 10 * 1024**2 or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)


def _disable_xet(value: str | None) -> str | None:
    """Set HF_HUB_DISABLE_XET for this process, also where huggingface_hub has read it already; returns what it was."""
    before = os.environ.pop("HF_HUB_DISABLE_XET", None)
    if value is not None:
        os.environ["HF_HUB_DISABLE_XET"] = value
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_DISABLE_XET = (value or "").upper() in ("1", "ON", "YES", "TRUE")  # type: ignore[attr-defined]
    return before


RESULT = {"task": {"type": str}, "dataset": {"type": str, "name": str}, "metrics": [{"type": str, "value": object}]}
CARD: dict[str, Any] = dict.fromkeys(("license", "library_name", "pipeline_tag"), str)
CARD |= {key: [str] for key in ("tags", "language", "datasets", "metrics", "base_model")}
CARD["model-index"] = [{"name": str, "results": [RESULT]}]


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata: the gross mistakes that the Hub rejects, far from all of them."""
    match = re.match(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", content.replace("\r\n", "\n"), re.DOTALL | re.MULTILINE)
    if not match or not match[1].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(card, dict):
        return ["the metadata must be a mapping"], []
    for key in {"language", "datasets", "metrics", "base_model"} & card.keys():  # one or several
        card[key] = [card[key]] if isinstance(card[key], str) else card[key]
    return [text for key in card if key in CARD for text in _misfits(card[key], CARD[key], key)], []


def _misfits(value: Any, shape: Any, name: str) -> list[str]:
    """Where `value` departs from `shape`: a type, [shape of every item] or {key: shape}."""
    if value is None:
        return [f'"{name}" is required']
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, kind) or value == "":
        return [f'"{name}" must be {({str: "a string", list: "an array", dict: "an object"}).get(kind, "given")}']
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, list):
        parts = [(item, shape[0], f"{name}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        parts = [(value.get(key), shape[key], f"{name}.{key}") for key in shape]
    return [text for part in parts for text in _misfits(*part)]
