"""Make a λ-GELU checkpoint of a GELU or SiLU one, or a ReLU checkpoint of a λ-GELU one, without loading the weights.

    python scripts/convert_checkpoint.py --source models/bert --target models/bert-lambda
    python scripts/convert_checkpoint.py --source runs/sst2 --target runs/sst2-relu --to relu

Folders in safetensors, of any size: weight files are hard links, with --copy copies. λ starts at --init_hardness;
--to relu refuses gates that are softer than --tolerance wants, unless --force. A model on the Hub first becomes a folder:

    hf download google-bert/bert-base-uncased --local-dir models/bert
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

import hf_lambda_gelu as hlg


@dataclass
class ConvertArguments:
    """What to convert, and into what."""

    source: str = field(metadata={"help": "Folder of the checkpoint."})
    target: str = field(metadata={"help": "Folder to make."})
    to: str = field(
        default="lambda_gelu", metadata={"choices": ["lambda_gelu", "relu"], "help": "What the activations shall be."}
    )
    init_hardness: float = field(default=1.0, metadata={"help": "λ to start from; 1 keeps the function."})
    tolerance: float = field(default=0.005, metadata={"help": "The hardness tolerance that the model was trained for."})
    force: bool = field(default=False, metadata={"help": "Replace gates that are still soft."})
    copy: bool = field(default=False, metadata={"help": "Copy weight files in place of linking them."})


def main(argv: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(ConvertArguments).parse_args_into_dataclasses(argv)
    link = not options.copy
    try:
        if options.to == "relu":
            report = hlg.relu_ize_checkpoint(
                options.source, options.target, options.force, tolerance=options.tolerance, link=link
            )
        else:
            report = hlg.convert_checkpoint(options.source, options.target, options.init_hardness, link=link)
    except (ValueError, hlg.SoftGateError) as error:
        sys.exit(str(error))
    print(report)


if __name__ == "__main__":
    main()
