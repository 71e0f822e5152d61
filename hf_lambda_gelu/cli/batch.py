"""What `push` does with one folder or several: all proven, then all uploaded.

Imports torch: the command imports it when it runs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

import hf_lambda_gelu as hlg

from ..reports import markdown_table
from .inner import REPORT_NAME, check_processor, check_relu, check_target, published_files, scratch_folder, whole_folder
from .models import loaded, processors, resolved, writable
from .work import UsageError


@dataclass(frozen=True)
class Batch:
    """What is to be published, and how it becomes ReLU where it is not yet."""

    folders: list[str]
    repo_id: str
    save_to: Path | None
    no_processor: bool
    details: dict[str, Any]
    tolerance: float
    force: bool
    trust_remote_code: bool = False

    def names(self) -> dict[str, str]:
        """Folder → repository; UsageError if two would be the same."""
        found = {}
        for folder in self.folders:
            path = Path(folder).expanduser().resolve()
            found[folder] = self.repo_id.replace("{run}", path.parent.name if path.name == "relu" else path.name)
        if len(set(found.values())) < len(self.folders):
            raise UsageError(
                f"{len(self.folders)} folders, but the repositories {sorted(set(found.values()))}: let --repo-id hold "
                "{run}"
            )
        return found

    def kept(self) -> dict[str, Path]:
        """Repository → where --save-to keeps it; UsageError if something is there."""
        if self.save_to is None:
            return {}
        kept = {repo_id: self.save_to / repo_id.rpartition("/")[2] for repo_id in self.names().values()}
        there = next((path for path in kept.values() if path.exists()), None)
        if there is not None:
            raise UsageError(f"--save-to: {str(there)!r} exists, choose another folder")
        return kept

    def as_relu(self, folder: str, scratch: Path, repo_id: str) -> Path:
        """The folder of a ReLU network: `folder`, or one in `scratch` that is made of its λ-GELU."""
        source = resolved(folder)
        model = loaded(source, self.trust_remote_code)
        if not hlg.hardness_sites(model):
            given = [f"--{name.replace('_', '-')}" for name, value in self.details.items() if value is not None]
            if given:
                raise UsageError(
                    f"{folder!r} is a ReLU checkpoint, which is uploaded as it is: change its README.md, and leave out "
                    f"{given[0]}"
                )
            check_relu(model)
            return writable(folder, source, scratch)
        print(hlg.relu_ize(model, self.force, tolerance=self.tolerance))
        return hlg.save_relu_pretrained(
            model,
            scratch / "relu",
            processor=processors(source, self.trust_remote_code),
            details=hlg.CardDetails(**self.details),
            model_name=repo_id,
            trust_remote_code=self.trust_remote_code,
        )


def pushed(batch: Batch, target: dict[str, Any], collection: str | None, dry_run: bool) -> tuple[dict[str, Any], str]:
    """Prove and upload; what is to be printed, as an object and as text.

    Args:
        target: `private`, `revision`, `tag`, `create_pr` of `push_relu_to_hub`.

    Raises:
        UsageError, ValueError: what can be known to fail, before anything is loaded.
        PushError: an upload failed; then the folder that its message names is kept.
    """
    names, kept, trust_remote_code = batch.names(), batch.kept(), batch.trust_remote_code
    api = HfApi()
    if not dry_run:
        owned = {name: check_target(api, name, None, target["tag"], target["create_pr"]) for name in names.values()}
        names = {folder: owned[name] for folder, name in names.items()}
        kept = {owned[name]: path for name, path in kept.items()}
    with scratch_folder(kept_on=(hlg.PushError,)) as scratch:  # its message names a folder in there
        saved: dict[str, Path] = {}
        for index, (folder, repo_id) in enumerate(names.items()):
            own = scratch / str(index)
            own.mkdir()
            path = batch.as_relu(folder, own, repo_id)
            if not batch.no_processor:
                check_processor(path)
            if dry_run or kept or len(names) > 1:  # all before the first upload; a single one is proven by the push
                network = loaded(path, trust_remote_code)
                hlg.verify_relu_pretrained(network, path, trust_remote_code=trust_remote_code)
            saved[repo_id] = path
        found = {repo_id: published_files(path, trust_remote_code) for repo_id, path in saved.items()}
        value: dict[str, Any] = {
            "dry_run": dry_run,
            "metrics": metrics(saved),
            "files": {repo_id: sizes(saved[repo_id], each.names) for repo_id, each in found.items()},
            "left_out": {repo_id: each.left_out for repo_id, each in found.items()},
        }
        text = table(value["metrics"])
        for repo_id, path in kept.items():
            keep_files(saved[repo_id], found[repo_id].names, path)
            saved[repo_id] = path
        if batch.save_to is not None:
            (batch.save_to / "results.md").write_text(text + "\n", encoding="utf-8")
        if dry_run:
            return value, f"{text}\n{contents(value['files'])}{stays(value['left_out'])}"
        value["urls"] = urls = upload(saved, api, {**target, "trust_remote_code": trust_remote_code})
        text += "".join(f"\n{url}" for url in urls.values()) + stays(value["left_out"])
    if collection:
        value["collection"] = collect(api, collection, list(names.values()), bool(target["private"]))
        text += f"\n{value['collection']}"
    return value, text


def keep_files(folder: Path, names: list[str], target: Path) -> None:
    """Copy the named files to a folder that appears when it is complete."""
    with whole_folder(target) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)


def upload(saved: dict[str, Path], api: HfApi, target: dict[str, Any]) -> dict[str, str]:
    """Repository → address of its commit or pull request."""
    found: dict[str, str] = {}
    for repo_id, path in saved.items():
        commit = hlg.push_relu_to_hub(path, repo_id, processor=(), api=api, **target)
        found[repo_id] = str(commit.pr_url or commit.commit_url)
    return found


def metrics(saved: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Repository → the metrics that its card has."""
    rows = {}
    for repo_id, path in saved.items():
        record = path / REPORT_NAME
        details = json.loads(record.read_text(encoding="utf-8")).get("details", {}) if record.is_file() else {}
        rows[repo_id] = details.get("results", {}).get(details.get("final"), {})
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The metrics in Markdown."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[repo_id, *(f"{row[c]:.4f}" if c in row else "–" for c in columns)] for repo_id, row in rows.items()]
    return markdown_table(["model", *columns], cells)


def sizes(folder: Path, names: list[str]) -> dict[str, int]:
    """File → bytes."""
    return {name: (folder / name).stat().st_size for name in names}


def contents(found: dict[str, dict[str, int]]) -> str:
    """What would be uploaded."""
    lines = []
    for repo_id, sizes in found.items():
        lines.append(f"{repo_id}, proven and not uploaded (--dry-run):")
        lines += [f"  {name}  {size:,} bytes" for name, size in sizes.items()]
    return "\n".join(lines)


def stays(left_out: dict[str, dict[str, str]]) -> str:
    """What is in the folders and is not uploaded, a line each; empty where there is nothing."""
    return "".join(
        f"\nnot uploaded to {repo_id}: {name} ({reason})"
        for repo_id, left in left_out.items()
        for name, reason in left.items()
    )


def collect(api: HfApi, title: str, repo_ids: list[str], private: bool) -> str:
    """Put the repositories into the collection of that title, which is made if need be; its address."""
    made = api.create_collection(title, namespace=repo_ids[0].partition("/")[0], private=private, exists_ok=True)
    for repo_id in repo_ids:
        api.add_collection_item(made.slug, repo_id, "model", exists_ok=True)
    return str(made.url)
