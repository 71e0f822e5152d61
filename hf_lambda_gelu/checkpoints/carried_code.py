"""The code that goes along with a saved model: only with trust, only what its files name, nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import CONFIG_NAME, logging

from .._compat import own_code_of
from ..structure.own_code import LAMBDA_CODE, code_files, references, settings_files, settings_of, with_auto_map

logger = logging.get_logger(__name__)

_ASKED = (
    "proven by running it, and published: read it, and pass trust_remote_code=True (--trust-remote-code) if you trust who "
    "wrote it"
)
_PARTS = {
    "AutoTokenizer": "tokenizer",
    "AutoProcessor": "processor",
    "AutoImageProcessor": "image_processor",
    "AutoFeatureExtractor": "feature_extractor",
    "AutoVideoProcessor": "video_processor",
}


def check_code_may_go(things: list[Any], trust_remote_code: bool) -> None:
    """Raises ValueError where saving one of these (model, config, tokenizer, processor) writes its code, without trust."""
    own = [type(thing).__name__ for thing in things if own_code_of(thing)]
    if own and not trust_remote_code:
        raise ValueError(f"{own[0]} is a class of a checkpoint's own code, which would be saved with the model, {_ASKED}")


def settle_code(folder: Path, trust_remote_code: bool) -> None:
    """Lets the auto_maps of a folder that is being made name the code that lies in it, and nothing else.

    An entry whose file is not there, or would come from another repository, is taken out, with a warning: whoever loads the
    model with trust would run what nobody has proven. Without trust that is each entry.
    """
    written = sorted(path.name for path in folder.glob("*.py"))
    if written and not trust_remote_code:
        raise ValueError(f"{written[0]} would be saved with the model, {_ASKED}")
    code = set(code_files(folder)) if trust_remote_code else set()
    for path in settings_files(folder):
        settings = settings_of(path)
        parts = with_auto_map(settings)
        before = json.dumps(settings, sort_keys=True)
        for part in parts:
            kept, lost = _settled(folder, part.pop("auto_map"), code)
            if kept:
                part["auto_map"] = kept
            for auto, target in lost:
                logger.warning(f"{path.name} does not name {target!r} as its {auto} any more: that code does not come along")
        if json.dumps(settings, sort_keys=True) != before:
            path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _settled(folder: Path, autos: Any, code: set[str]) -> tuple[Any, list[tuple[str, str]]]:
    """The entries that stay, and those that do not."""
    entries = autos if isinstance(autos, dict) else {"AutoTokenizer": autos}
    kept: dict[str, Any] = {}
    lost: list[tuple[str, str]] = []
    for auto, value in entries.items():
        if isinstance(value, (list, tuple)):
            here: Any = [_here(folder, item, code) for item in value]
            gone = [item for item, left in zip(value, here, strict=True) if item and not left]
            here = here if any(here) else None
        elif isinstance(value, dict):
            here = {key: left for key, item in value.items() if (left := _here(folder, item, code))}
            gone = [item for key, item in value.items() if key not in here]
        else:
            here = _here(folder, value, code)
            gone = [] if here else [value]
        if here:
            kept[auto] = here
        lost += [(auto, item) for item in gone if not str(item).startswith(f"{LAMBDA_CODE}.")]
    return kept, lost


def _here(folder: Path, target: Any, code: set[str]) -> str | None:
    """The entry as one of a file of the folder; None where it is none."""
    if not isinstance(target, str):
        return None
    plain = target.rpartition("--")[2]
    module, _, name = plain.partition(".")
    if f"{module}.py" not in code:
        return None
    text = (folder / f"{module}.py").read_text(encoding="utf-8", errors="replace")
    return plain if plain == target or re.search(rf"^class {re.escape(name)}\b", text, re.MULTILINE) else None


def loading_lines(folder: Path, architecture: str) -> dict[str, Any] | None:
    """What the card says of code: its files, and the Auto classes that load the model and the rest; None without any."""
    found, code = references(folder), code_files(folder)
    if not code:
        return None
    others = {auto: name for auto, name in _PARTS.items() if any(r.auto == auto and r.file != CONFIG_NAME for r in found)}
    return {"files": code, "model": auto_of(folder, architecture), "others": others}


def auto_of(folder: Path, architecture: str) -> str | None:
    """The Auto class by which transformers loads the class of that name from the folder's code; None where it does not."""
    found = [r.auto for r in references(folder) if r.file == CONFIG_NAME and r.name == architecture]
    return next((auto for auto in found if auto.startswith("AutoModel") and hasattr(transformers, auto)), None)
