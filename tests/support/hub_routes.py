"""The addresses that the stand-in for the Hub answers: uploads, references, collections, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from support.hub_card import check_card
from support.hub_repository import Commit, HubError, Repo, git_oid, is_lfs

if TYPE_CHECKING:
    from support.hub_server import Call, HubServer


@dataclass
class Collection:
    """A collection of repositories."""

    title: str
    private: bool
    items: list[str] = field(default_factory=list)


class Reply(NamedTuple):
    """A good answer; a body that is not bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Reply]]] = []


def route(method: str, pattern: str, public: bool = False) -> Callable[[Any], Any]:
    """Register a handler: {repo} is a repository id, {other} one path segment. All but GET need the token."""
    regex = re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern.replace("{repo}", "(?P<repo>[^/]+(?:/[^/]+)?)"))

    def register(handler: Any) -> Any:
        ROUTES.append((method, re.compile(regex), public or method == "GET", handler))
        return handler

    return register


@route("GET", "/api/whoami-v2")
def _whoami(hub: HubServer, call: Call) -> Reply:
    if "Authorization" not in call.headers:
        raise HubError(401, "Invalid username or password.")
    return Reply({"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@route("POST", "/api/validate-yaml", public=True)
def _validate(hub: HubServer, call: Call) -> Reply:
    errors, warnings = check_card(call.json()["content"])
    status = 400 if errors else 200
    if call.headers.get("Accept") == "text/plain":
        return Reply("\n".join(errors).encode(), status, {"Content-Type": "text/plain"})
    found = {"errors": errors, "warnings": warnings}
    return Reply({kind: [{"message": text} for text in texts] for kind, texts in found.items()}, status)


@route("POST", "/api/repos/create")
def _create(hub: HubServer, call: Call) -> Reply:
    asked = call.json()
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    if asked.get("type", "model") != "model":
        raise HubError(400, "this stand-in holds models only")
    about = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return Reply(about | {"error": "You already created this model repo"}, 409)
    asked.setdefault("visibility", "private" if hub.private_by_default else "public")
    hub.add_repo(repo_id, private=asked["visibility"] == "private")
    return Reply(about)


@route("POST", "/api/models/{repo}/preupload/{rev}")
def _preupload(hub: HubServer, call: Call, repo: Repo, rev: str) -> Reply:
    head, answer = repo.snapshots[repo.resolve(rev)], []
    for file in call.json()["files"]:
        path = file["path"]
        mode = "lfs" if is_lfs(path, file["size"]) or b"\0" in base64.b64decode(file["sample"]) else "regular"
        known = repo.oid(path, head[path]) if path in head else None  # the client leaves unchanged files out
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    return Reply({"files": answer})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def _lfs_batch(hub: HubServer, call: Call, repo: Repo) -> Reply:
    objects = [{"oid": item["oid"], "size": item["size"]} for item in call.json()["objects"]]
    for item in objects:
        if item["oid"] not in hub.blobs:  # what is here already is not asked for again
            signature = secrets.token_hex(8)
            hub.signatures[signature] = item["oid"]
            item["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}?signature={signature}"}}
    return Reply({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{oid}", public=True)
def _lfs_put(hub: HubServer, call: Call, oid: str) -> Reply:
    if hub.signatures.get(call.query.get("signature", [""])[0]) != oid:
        raise HubError(403, "SignatureDoesNotMatch")
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "BadDigest")
    hub.blobs[oid] = call.body
    return Reply()


@route("POST", "/api/models/{repo}/commit/{rev}")
def _commit(hub: HubServer, call: Call, repo: Repo, rev: str) -> Reply:
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
            if value["oid"] not in hub.blobs:
                raise HubError(400, f"the LFS object of {path} was not uploaded")
            files[path] = hub.blobs[value["oid"]]
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
    return Reply({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo.repo_id}/commit/{oid}"})


@route("POST", "/api/models/{repo}/(?P<kind>tag|branch)/{name}")
def _new_ref(hub: HubServer, call: Call, repo: Repo, kind: str, name: str) -> Reply:
    asked = call.json()  # a tag's address names what is tagged, a branch's address the new branch
    refs, new = (repo.tags, asked["tag"]) if kind == "tag" else (repo.branches, name)
    if new in refs:
        raise HubError(409, f"Reference already exists: {new}")
    refs[new] = repo.resolve(name if kind == "tag" else asked.get("startingPoint", "main"))
    return Reply({})


@route("POST", "/api/collections")
def _new_collection(hub: HubServer, call: Call) -> Reply:
    asked = call.json()
    slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
    if slug in hub.collections:
        return Reply({"error": "exists", "slug": slug}, 409)
    hub.collections[slug] = Collection(asked["title"], asked.get("private", False))
    return _collection(hub, call, slug)


@route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
def _new_item(hub: HubServer, call: Call, slug: str) -> Reply:
    item = call.json()["item"]
    if item["id"] not in hub.repos:
        raise HubError(404, "no such repository")
    if item["id"] in hub.collections[slug].items:
        raise HubError(409, "Item is in the collection already")
    hub.collections[slug].items.append(item["id"])
    return _collection(hub, call, slug)


@route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def _collection(hub: HubServer, call: Call, slug: str) -> Reply:
    found = hub.collections[slug]
    items = [{"_id": str(n), "id": i, "type": "model", "position": n} for n, i in enumerate(found.items)]
    about = {"slug": slug, "title": found.title, "private": found.private, "items": items, "owner": {"name": hub.user}}
    about |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
    return Reply(about)


@route("GET", "/api/models/{repo}/tree/{rev}(?:/(?P<folder>.+))?")
def _tree(hub: HubServer, call: Call, repo: Repo, rev: str, folder: str) -> Reply:
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
def _resolve(hub: HubServer, call: Call, repo: Repo, rev: str, path: str) -> Reply:
    oid = repo.resolve(rev)
    data = repo.snapshots[oid].get(path)
    if data is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": oid})
    return Reply(data, 200, {"X-Repo-Commit": oid, "ETag": f'"{repo.oid(path, data)}"'})


@route("GET", "/api/models/{repo}(?:/revision/{rev})?")
def _info(hub: HubServer, call: Call, repo: Repo, rev: str) -> Reply:
    oid = repo.resolve(rev or "main")
    siblings = [{"rfilename": path} for path in repo.snapshots[oid]]
    names = {"id": repo.repo_id, "modelId": repo.repo_id, "author": repo.repo_id.split("/")[0], "tags": []}
    front = repo.snapshots[oid].get("README.md", b"").decode().split("---\n")
    card = yaml.safe_load(front[1]) if len(front) > 2 else {}
    names |= {key: card[key] for key in ("pipeline_tag", "library_name", "tags") if key in card} | {"cardData": card}
    return Reply(names | {"sha": oid, "private": repo.private, "siblings": siblings})
