"""Publish a checkpoint as a ReLU network that stock transformers loads.

    python scripts/push_to_hub.py --folder runs/sst2/relu --repo_id your-name/bert-sst2-relu

The folder is one of save_relu_pretrained, uploaded as it is, or one that LambdaGELUTrainer saved: then its gates, which must
be hard, are replaced by ReLU, and --base_model, --dataset and --license go into the card that is written. Before
anything is uploaded, the saved model is loaded in a process without this package and compared. The token is the
one of `hf auth login`, or $HF_TOKEN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, HfArgumentParser

import hf_lambda_gelu as hlg
from hf_lambda_gelu.hub import load_saved


@dataclass
class PushArguments:
    """What to publish, and where."""

    folder: str = field(metadata={"help": "Folder of the checkpoint."})
    repo_id: str = field(metadata={"help": "Hub repository, as name or owner/name; made if it does not exist."})
    base_model: str | None = field(default=None, metadata={"help": "Hub name of the pretrained model, for the card."})
    dataset: str | None = field(default=None, metadata={"help": "Hub name of the data, for the card."})
    license: str | None = field(default=None, metadata={"help": "Licence identifier; that of the base model."})
    tolerance: float = field(default=0.005, metadata={"help": "The hardness tolerance that the model was trained for."})
    force: bool = field(default=False, metadata={"help": "Replace gates that are still soft."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to."})
    tag: str | None = field(default=None, metadata={"help": "Tag to give the commit, such as v1."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})


def main(argv: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(PushArguments).parse_args_into_dataclasses(argv)
    target = {"private": options.private, "revision": options.revision}
    target |= {"tag": options.tag, "create_pr": options.create_pr}
    model = load_saved(options.folder)
    if hlg.hardness_sites(model):
        print(hlg.relu_ize(model, options.force, tolerance=options.tolerance))
        details = hlg.CardDetails(base_model=options.base_model, dataset=options.dataset, license=options.license)
        commit = hlg.push_relu_to_hub(
            model, options.repo_id, processor=processors(Path(options.folder)) or (), details=details, **target
        )
    else:
        commit = hlg.push_relu_to_hub(options.folder, options.repo_id, **target)
    print(commit.pr_url or commit.commit_url)


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
