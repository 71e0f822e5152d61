"""A λ-GELU checkpoint that loads without this package: by a file of its own, under `trust_remote_code`."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

from transformers import PreTrainedModel

from ..activation.module import hardness_sites
from ..structure.adapters import has_adapters, how_to_merge
from ..structure.hard_coded import hard_coded_sites
from ..structure.own_code import LAMBDA_CODE, auto_classes
from ..structure.transaction import transaction
from .folders import check_new, whole_folder

CODE_NAME = f"{LAMBDA_CODE}.py"


@transaction
def save_with_code(model: PreTrainedModel, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Saves as `model.save_pretrained(folder)` does, and beside the weights the code that they need; whole or not at all.

    `AutoModelFor….from_pretrained(folder, trust_remote_code=True)` then loads the model where this package is not installed.
    Other ways to load a λ-GELU checkpoint: with this package imported, as any other; or folded (`fold`), in stock
    transformers without any code.

    Args:
        model: a converted model of a class that transformers itself exports.
        folder: the folder to make. One that is not empty is refused unless `overwrite`, which replaces a saved model.

    Returns:
        The folder.

    Raises:
        ValueError: no λ-GELU in the model, sites that no config attribute governs, adapters that are not merged, or a class
            that no Auto class knows; an existing or unwritable folder. Nothing is written.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1))
        >>> report, folder = hlg.convert(model), hlg.save_with_code(model, "runs/with-code")
        >>> model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    """
    name = type(model).__name__
    if not hardness_sites(model):
        raise ValueError(f"{name} has no λ-GELU: save_pretrained does, without any code")
    if has_adapters(model):
        raise ValueError(f"{name} has adapters: {how_to_merge(model)}")
    free = hard_coded_sites(model)
    if free:
        raise ValueError(f"a reload cannot build λ-GELU at {free[0]}, which the class hard-codes: fold(model) instead")
    autos = auto_classes(name)
    if not autos:
        raise ValueError(
            f"no Auto class of transformers makes a {name}: save_pretrained, and load with hf_lambda_gelu imported"
        )
    folder = Path(os.path.abspath(folder))
    check_new(folder, overwrite)
    with whole_folder(folder, overwrite) as temporary:
        model.save_pretrained(temporary)
        code = (resources.files(__package__) / "templates" / CODE_NAME).read_text(encoding="utf-8").replace("@CLASS@", name)
        (temporary / CODE_NAME).write_text(code, encoding="utf-8")
        path = temporary / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["auto_map"] = dict.fromkeys(autos, f"{LAMBDA_CODE}.LambdaGELU{name}")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder
