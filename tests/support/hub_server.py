"""A stand-in for the Hugging Face Hub on 127.0.0.1: standard library and PyYAML, everything in memory, faults on demand.

It speaks what `huggingface_hub` 2.x and `transformers` 5.x use to publish a model and to load it again: model
repositories, plain LFS, no Xet. The client reads HF_ENDPOINT when it is imported, so it runs in a subprocess with
`hub.env(home)`. In this process only `HfApi(endpoint=hub.url, token=...)` works, and none of the card functions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_repository import ATTRIBUTES, HubError, Repo, is_lfs
from support.hub_routes import ROUTES, Collection, Reply


class Request(NamedTuple):
    """One request as answered: `path` is unquoted and has no query, `status` 0 is a dropped connection."""

    method: str
    path: str
    status: int


class Fault(NamedTuple):
    """An injected failure, see `HubServer.fail_next`."""

    method: str
    path_regex: str
    status: int
    applied: bool
    headers: dict[str, str]


class HubServer:
    """`with HubServer() as hub:` gives `url`, `env()`, `repos`, `requests`, `fail_next()` and `add_repo()`."""

    def __init__(self, token: str = "hf_test", user: str = "tester") -> None:
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collection] = {}
        self.private_by_default = False  # as an organisation may have it
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self.blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.signatures: dict[str, str] = {}  # of upload addresses -> SHA-256
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


def _disable_xet(value: str | None) -> str | None:
    """Set HF_HUB_DISABLE_XET for this process, also where huggingface_hub has read it already; returns what it was."""
    before = os.environ.pop("HF_HUB_DISABLE_XET", None)
    if value is not None:
        os.environ["HF_HUB_DISABLE_XET"] = value
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_DISABLE_XET = (value or "").upper() in ("1", "ON", "YES", "TRUE")  # type: ignore[attr-defined]
    return before
