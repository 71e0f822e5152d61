"""Publish checkpoints as ReLU networks that stock transformers loads; several as a collection.

    python scripts/push_to_hub.py --folder runs/sst2/relu --repo_id your-name/bert-sst2-relu
    python scripts/push_to_hub.py --folder runs/seed0/relu runs/seed1/relu --repo_id your-name/bert-relu-{run} \
        --collection "BERT as ReLU networks" --dry_run

A folder is one of save_relu_pretrained, uploaded as it is, or one that LambdaGELUTrainer saved: then its gates, which must
be hard, are replaced by ReLU, and --base_model, --dataset and --license go into the card that is written. All are saved and
compared with what stock transformers loads, in a process without this package, before the first upload. {run} in the
repository's name stands for the folder's name, or its parent's if that is relu. The token is the one of `hf auth login`, or
$HF_TOKEN.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, HfArgumentParser

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import REPORT_NAME
from hf_lambda_gelu.checkpoints.hub import check_processor, check_target
from hf_lambda_gelu.structure.loading import load_saved


@dataclass
class PushArguments:
    """What to publish, and where."""

    folder: list[str] = field(metadata={"help": "Folders of the checkpoints."})
    repo_id: str = field(
        metadata={"help": "Hub repository, as name or owner/name, made if need be; with {run} for several folders."}
    )
    collection: str | None = field(default=None, metadata={"help": "Title of a collection to put the repositories into."})
    dry_run: bool = field(default=False, metadata={"help": "Prove the models, show what would be uploaded, upload nothing."})
    save_to: str | None = field(
        default=None, metadata={"help": "Folder to keep the proven ones in, and results.md; with --dry_run, that is all."}
    )
    no_processor: bool = field(default=False, metadata={"help": "Publish without a tokenizer or image processor."})
    base_model: str | None = field(default=None, metadata={"help": "Hub name of the pretrained model, for the card."})
    dataset: str | None = field(default=None, metadata={"help": "Hub name of the data, for the card."})
    license: str | None = field(default=None, metadata={"help": "Licence identifier; that of the base model."})
    tolerance: float = field(default=0.005, metadata={"help": "The hardness tolerance that the model was trained for."})
    force: bool = field(default=False, metadata={"help": "Replace gates that are still soft."})
    private: bool = field(default=False, metadata={"help": "Make repositories and collection private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to."})
    tag: str | None = field(default=None, metadata={"help": "Tag to give the commit, such as v1."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})


def main(argv: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(PushArguments).parse_args_into_dataclasses(argv)
    targets = names(options.folder, options.repo_id)
    kept = {repo_id: Path(options.save_to) / repo_id.rpartition("/")[2] for repo_id in targets.values() if options.save_to}
    there = next((path for path in kept.values() if path.exists()), None)
    if there is not None:
        sys.exit(f"--save_to: {str(there)!r} exists, choose another folder")
    api = HfApi()
    if not options.dry_run:
        for repo_id in targets.values():
            check_target(api, repo_id, None, options.tag, options.create_pr)
    with tempfile.TemporaryDirectory(prefix="push-") as scratch:
        saved = {}
        for folder, repo_id in targets.items():
            path = as_relu(Path(folder), Path(scratch) / str(len(saved)), repo_id, options)
            if not options.no_processor:
                check_processor(path)
            if (
                options.dry_run or kept or len(targets) > 1
            ):  # all before the first upload; a single one is proven by the push
                hlg.verify_relu_pretrained(load_saved(path), path)
            saved[repo_id] = path
        print(table(saved))
        for repo_id, path in kept.items():
            shutil.copytree(saved[repo_id], path)
        if options.save_to:
            (Path(options.save_to) / "results.md").write_text(table(saved) + "\n", encoding="utf-8")
        if options.dry_run:
            print(contents(saved))
            return
        for repo_id, path in saved.items():
            commit = hlg.push_relu_to_hub(
                path,
                repo_id,
                processor=(),
                private=options.private,
                revision=options.revision,
                tag=options.tag,
                create_pr=options.create_pr,
                api=api,
            )
            print(commit.pr_url or commit.commit_url)
    if options.collection:
        print(collect(api, options.collection, list(targets.values()), options.private))


def names(folders: list[str], repo_id: str) -> dict[str, str]:
    """Folder → repository; exits if two would be the same."""
    runs = {folder: Path(folder).resolve() for folder in folders}
    found = {f: repo_id.replace("{run}", p.parent.name if p.name == "relu" else p.name) for f, p in runs.items()}
    if len(set(found.values())) < len(folders):
        sys.exit(f"{len(folders)} folders, but the repositories {sorted(set(found.values()))}: let --repo_id hold {{run}}")
    return found


def as_relu(folder: Path, scratch: Path, repo_id: str, options: PushArguments) -> Path:
    """The folder of a ReLU network: `folder`, or one in `scratch` that is made of its λ-GELU."""
    model = load_saved(folder)
    if not hlg.hardness_sites(model):
        return folder
    print(hlg.relu_ize(model, options.force, tolerance=options.tolerance))
    details = hlg.CardDetails(base_model=options.base_model, dataset=options.dataset, license=options.license)
    return hlg.save_relu_pretrained(model, scratch, processor=processors(folder), details=details, model_name=repo_id)


def table(saved: dict[str, Path]) -> str:
    """The metrics of each, as its card has them, in Markdown."""
    rows: dict[str, dict[str, float]] = {}
    for repo_id, path in saved.items():
        record = path / REPORT_NAME
        details = json.loads(record.read_text(encoding="utf-8")).get("details", {}) if record.is_file() else {}
        rows[repo_id] = details.get("results", {}).get(details.get("final"), {})
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| " + " | ".join(["model", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for repo_id, row in rows.items():
        lines.append("| " + " | ".join([repo_id, *(f"{row[c]:.4f}" if c in row else "–" for c in columns)]) + " |")
    return "\n".join(lines)


def contents(saved: dict[str, Path]) -> str:
    """What would be uploaded."""
    lines = []
    for repo_id, path in saved.items():
        lines.append(f"{repo_id}, proven and not uploaded (--dry_run):")
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            lines.append(f"  {file.relative_to(path)}  {file.stat().st_size:,} bytes")
    return "\n".join(lines)


def collect(api: HfApi, title: str, repo_ids: list[str], private: bool) -> str:
    """Put the repositories into the collection of that title, which is made if need be; its address."""
    owner = api.whoami()["name"]
    ids = [repo_id if "/" in repo_id else f"{owner}/{repo_id}" for repo_id in repo_ids]
    collection = api.create_collection(title, namespace=ids[0].partition("/")[0], private=private, exists_ok=True)
    for repo_id in ids:
        api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    return collection.url


def processors(folder: Path) -> list[object]:
    """The tokenizer, image processor and feature extractor that the folder holds."""
    found: list[object] = []
    if (folder / "tokenizer_config.json").is_file():
        found.append(AutoTokenizer.from_pretrained(folder))
    if (folder / "preprocessor_config.json").is_file():
        for auto in (AutoImageProcessor, AutoFeatureExtractor):
            try:
                found.append(auto.from_pretrained(folder))
                break
            except (ValueError, OSError):  # of the other kind
                continue
    return found


if __name__ == "__main__":
    main()
