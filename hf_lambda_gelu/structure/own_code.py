"""A checkpoint's code of its own: Python files beside its weights that its JSON files name, in `auto_map`.

transformers runs them when it loads config, model, tokenizer or processor with trust_remote_code=True. `check_trusted` of
`loading` stands before every load of a folder, so that nothing runs, and nobody is asked, where the caller has not said so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_imports
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME

from .._compat import auto_mapping, with_generation

LAMBDA_CODE = "modeling_lambda_gelu"  # what save_with_code writes, and this package has itself
CUSTOM_GENERATE = "custom_generate/generate.py"
_SETTINGS = ("config", "tokenizer_config", "preprocessor_config", "processor_config", "video_preprocessor_config")
# what names the class that an Auto class makes; of an AutoModelFor…, the architectures do
_NAMED_BY = {
    "AutoTokenizer": "tokenizer_class",
    "AutoProcessor": "processor_class",
    "AutoImageProcessor": "image_processor_type",
    "AutoFeatureExtractor": "feature_extractor_type",
    "AutoVideoProcessor": "video_processor_type",
}


class Reference(NamedTuple):
    """One entry of an auto_map: the file that holds it, the Auto class, and "module.Class" or "owner/name--module.Class"."""

    file: str
    auto: str
    target: str

    @property
    def module(self) -> str:
        return self.target.rpartition("--")[2].partition(".")[0]

    @property
    def name(self) -> str:
        return self.target.rpartition(".")[2]


def settings_files(folder: Path) -> list[Path]:
    """The JSON files from which transformers reads what to load: those of the folder, and of its processor's parts."""
    return [path for name in _SETTINGS for path in sorted([*folder.glob(f"{name}.json"), *folder.glob(f"*/{name}.json")])]


def settings_of(path: Path) -> dict[str, Any]:
    """A JSON file's content; {} of one that is damaged, of which its own reader says so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def with_auto_map(settings: Any) -> list[dict[str, Any]]:
    """The objects with an auto_map among a file's settings: parts of a processor may have one each."""
    found, waiting = [], [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found += [value] if value.get("auto_map") else []
            waiting += [part for key, part in value.items() if key != "auto_map"]
        elif isinstance(value, list):
            waiting += value
    return found


def references(folder: Path) -> list[Reference]:
    """All code that the folder's files name, but for this package's own."""
    files = settings_files(folder)
    return [found for path in files for part in with_auto_map(settings_of(path)) for found in _of(path, part)]


def _of(path: Path, part: dict[str, Any]) -> list[Reference]:
    autos = part["auto_map"]
    entries = autos.items() if isinstance(autos, dict) else [("AutoTokenizer", autos)]  # as old tokenizers have it
    found = [Reference(path.name, str(auto), target) for auto, value in entries for target in _texts(value)]
    return [reference for reference in found if reference.module != LAMBDA_CODE]


def _texts(value: Any) -> list[str]:
    """The texts in it: the entry of a tokenizer is a pair, that of an image processor may be an object."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return [str(item) for item in items if item]


def _needed(path: Path) -> list[Reference]:
    """The entries of classes that transformers does not have itself, so that loading would run the code."""
    found = []
    for part in with_auto_map(settings_of(path)):
        kind, names = part.get("model_type"), part.get("architectures") or []
        known = isinstance(kind, str) and kind in CONFIG_MAPPING and isinstance(names, list) and all(map(_is_known, names))
        for reference in _of(path, part):
            if path.name == CONFIG_NAME and (reference.auto not in _NAMED_BY or reference.auto == "AutoTokenizer"):
                is_known = known  # transformers looks for a tokenizer's in its own file alone
            else:
                is_known = _is_known(part.get(_NAMED_BY.get(reference.auto, "")))
            found += [] if is_known else [reference]
    return found


def _is_known(name: Any) -> bool:
    """Whether transformers has a class of that name; of a tokenizer, one of its two."""
    if not isinstance(name, str) or not name:
        return False
    names = (name, f"{name}Fast", name.removesuffix("Fast"))
    return any(isinstance(getattr(transformers, each, None), type) for each in names)


def refusal(folder: Path, trust_remote_code: bool) -> str | None:
    """Why the folder is not to be loaded; None where it may be. Nothing is imported.

    Code is not needed, and never runs without trust, where transformers has the class that the files name.
    """
    if trust_remote_code:
        return _not_of_the_folder(folder)
    kernel = _kernel(folder)
    if kernel:
        return (
            f"{str(folder)!r}: {CONFIG_NAME} names a kernel of the Hub, {kernel!r}, which would be downloaded and run. Pass "
            "trust_remote_code=True (--trust-remote-code) if you trust who wrote it, or take it out"
        )
    needed = [reference for path in settings_files(folder) for reference in _needed(path)]
    if not needed:
        return None
    first = needed[0]
    place = f"{first.module}.py there" if "--" not in first.target else f"the repository {first.target.partition('--')[0]!r}"
    return (
        f"{str(folder)!r} has code of its own, which does not run unless you say so: {first.file} names {first.target!r} as "
        f"its {first.auto}. Read {place}, and pass trust_remote_code=True (--trust-remote-code) if you trust who wrote it"
    )


def _not_of_the_folder(folder: Path) -> str | None:
    """Why code cannot be that of the folder, the only one that is run."""
    for reference in references(folder):
        if "--" in reference.target:
            return (
                f"{str(folder)!r}: {reference.file} names {reference.target!r} as its {reference.auto}, code of another "
                "repository, which may be another tomorrow, so that nothing can be proven of it. Load the model by "
                f"{reference.auto}.from_pretrained with trust_remote_code=True and a code_revision, save_pretrained, and "
                "pass that folder: the code then lies in it"
            )
        if not re.fullmatch(r"[^\W\d]\w*\.[^\W\d]\w*", reference.target):
            return (
                f"{str(folder)!r}: {reference.file} names {reference.target!r} as its {reference.auto}: expected "
                "module.Class, of a Python file beside it"
            )
    return None


def _kernel(folder: Path) -> str | None:
    settings = settings_of(folder / CONFIG_NAME)
    values = [value for key in ("attn_implementation", "_attn_implementation") for value in _texts(settings.get(key))]
    return next((value for value in values if "/" in value), None)


def code_files(folder: Path) -> list[str]:
    """The Python files that loading with trust runs: those that an auto_map names, a custom_generate/generate.py, and what
    they import relatively. Paths in the folder, with /, in order; those that are there."""
    wanted = [f"{reference.module}.py" for reference in references(folder) if reference.module.isidentifier()]
    wanted += [CUSTOM_GENERATE] if (folder / CUSTOM_GENERATE).is_file() else []
    found: list[str] = []
    while wanted:
        name = wanted.pop()
        if name in found or not (folder / name).is_file():
            continue
        found.append(name)
        try:
            imported = get_relative_imports(folder / name)
        except (OSError, UnicodeDecodeError):
            continue
        home = name.rpartition("/")[0]
        wanted += [f"{home}/{module}.py".lstrip("/") for module in imported if module.isidentifier()]
    return sorted(found)


def own_model_class(folder: Path, config: PreTrainedConfig) -> tuple[str, type[PreTrainedModel]] | None:
    """The Auto class and the class of the folder's code that makes its model; None where it names none. Runs that code.

    The class is what the Auto class makes of it: it saves its code with the model.
    """
    found = [r for r in references(folder) if r.file == CONFIG_NAME and r.auto.startswith("AutoModel")]
    wanted = (config.architectures or [""])[0]
    of_the_class = [r for r in found if r.name == wanted] or [r for r in found if r.auto in auto_classes(wanted)]
    chosen = (of_the_class or ([] if wanted else found))[:1]
    for reference in chosen:
        cls: Any = get_class_from_dynamic_module(reference.target, folder, local_files_only=True)
        cls.register_for_auto_class(reference.auto)
        return reference.auto, with_generation(cls)
    return None


def auto_classes(name: str) -> list[str]:
    """The Auto classes of transformers that make a model of the class called `name`."""
    found = []
    for auto, cls in vars(modeling_auto).items():
        values = auto_mapping(cls).values() if auto.startswith("AutoModel") else ()
        if name in (n for value in values for n in ([value] if isinstance(value, str) else value)):
            found.append(auto)
    return found
