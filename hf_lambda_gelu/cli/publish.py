"""`verify` and `push`: the proof in stock transformers, and the upload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .models import loaded, resolved, writable
from .work import FAILED, working


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a ReLU checkpoint, or a Hub name.")],
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Prove a ReLU checkpoint in stock transformers.

    It is loaded in a process that cannot import this package, and outputs and tensors are compared. Exits with 1 where it
    does not hold. What was compared is kept in the folder's lambda_gelu.json, with the SHA-256 of each file; of a model on
    the Hub, the files are compared with those first.

    \b
    Examples:
      hf-lambda-gelu verify runs/sst2-relu
      hf-lambda-gelu verify you/sst2-relu
    """
    with working(json, debug) as result:
        from .inner import scratch_folder

        with scratch_folder() as scratch:
            value, text = _proof(model, scratch, trust_remote_code)
        result.set(value, text, 0 if value["holds"] else FAILED)


def _proof(model: str, scratch: Path, trust_remote_code: bool) -> tuple[dict[str, Any], str]:
    """What `verify` found, and its text."""
    import hf_lambda_gelu as hlg

    from .inner import check_as_proven, check_relu, check_trusted

    source = resolved(model)
    folder = writable(model, source, scratch)
    check_trusted(folder, trust_remote_code)
    value: dict[str, Any] = {"model": model, "holds": False, "largest_difference": None, "as_proven": None, "reason": None}
    try:
        if folder != source:  # a stranger's, who has proven it and says of what
            value["as_proven"] = check_as_proven(folder)
        network = loaded(folder, trust_remote_code)
        check_relu(network)
        difference = hlg.verify_relu_pretrained(network, folder, trust_remote_code=trust_remote_code)
    except (ValueError, hlg.VerificationError) as error:
        value["reason"] = " ".join(str(error).split())
        return value, f"{model} is no ReLU checkpoint of stock transformers: {value['reason']}"
    told = {None: "", True: " Its files are those of its proof.", False: " Its card does not say which files were proven."}
    text = f"{model} holds: stock transformers loads it, and its outputs differ by {difference:g} at most."
    return value | {"holds": True, "largest_difference": difference}, text + told[value["as_proven"]]


def push(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="Folders of checkpoints, or Hub names.")],
    repo_id: Annotated[
        str, typer.Option(help="Repository, as name or owner/name, made if need be; with {run} for several folders.")
    ],
    collection: Annotated[
        str | None, typer.Option(help="Title of a collection to put the repositories into.", metavar="TITLE")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prove the models, show the files, upload nothing.")] = False,
    save_to: Annotated[
        Path | None, typer.Option(help="Folder to keep the proven ones in before the upload, with results.md.")
    ] = None,
    no_processor: Annotated[
        bool, typer.Option("--no-processor", help="Publish without a tokenizer or image processor.")
    ] = False,
    base_model: o.BaseModel = None,
    dataset: o.Dataset = None,
    license: o.License = None,
    tolerance: o.Tolerance = 0.005,
    force: o.Force = False,
    private: Annotated[bool, typer.Option("--private", help="Make repositories and collection private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag to give the commit, such as v1.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Publish ReLU checkpoints on the Hub.

    All are proven in stock transformers before the first upload; each goes up in one commit. A folder that relu-ize or
    save_relu_pretrained made is uploaded as it is. Of a λ-GELU checkpoint the gates, which must be hard, become ReLU, and a
    card is written. Only files of the model, its tokenizer or processor and this package are uploaded; others are named.
    {run} stands for the folder's name, or its parent's if that is relu. The token is that of `hf auth login`, or $HF_TOKEN.

    \b
    Examples:
      hf-lambda-gelu push runs/sst2-relu --repo-id you/bert-sst2-relu --dry-run
      hf-lambda-gelu push runs/seed0/relu runs/seed1/relu --repo-id 'you/bert-relu-{run}' \\
          --collection "BERT as ReLU networks"
    """
    with working(json, debug) as result:
        from .batch import Batch, pushed

        details = {"base_model": base_model, "dataset": dataset, "license": license}
        batch = Batch(folders, repo_id, save_to, no_processor, details, tolerance, force, trust_remote_code)
        target = {"private": private or None, "revision": revision, "tag": tag, "create_pr": create_pr}
        result.set(*pushed(batch, target, collection, dry_run))
