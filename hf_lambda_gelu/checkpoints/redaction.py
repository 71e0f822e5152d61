"""What a card and its record must not hold: secrets, and the folders of the machine that made them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# a name that ends in, or has as one of its words, what secrets are called: hub_token, --api-key, HF_TOKEN, authToken;
# not tokenizer_name or chat_tokens; bounded, so that a long text takes no time
_NAME = (
    r"(?:[a-z0-9]{1,40}[-_.]){0,9}[a-z0-9]{0,40}(?:token|key|api_?keys|secrets?|passwords?|passwd|pwd|passphrase|credentials?|bearer|auth"
    r"|authorization)(?:[-_.][a-z0-9]{1,40}){0,9}(?![a-z0-9])"
)
_WORD = r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s'"\\])+"""  # of a shell
_START = r"(?:(?<=\s)|^)"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_SECRETS = (
    re.compile(rf"{_START}(?P<quote>['\"])[-+~]{{0,2}}{_NAME}=.*?(?P=quote)[ \t]*", re.IGNORECASE | re.DOTALL),
    re.compile(rf"{_START}(?:export[ \t]+)?[-+~]{{0,2}}{_NAME}=(?:{_WORD})?[ \t]*", re.IGNORECASE),
    re.compile(
        rf"{_START}--?{_NAME}(?:(?:[ \t]|\\\n)+(?!--?[a-z])(?!\\\n){_WORD})?[ \t]*",
        re.IGNORECASE,
    ),
    re.compile(rf"(?P<quote>\\?['\"]){_NAME}(?P=quote)\s*:\s*(?:{_WORD}?(?=[,}}])|{_WORD}),?[ \t]*", re.IGNORECASE),
)
# within a word or a value: of an address, a header, a list of settings
_REST = r"(?:(?:Bearer|Basic|Token)[ \t]+)?[^\s,;&'\"})\]]+"
_WITHIN = (
    re.compile(rf"(?:(?<=[{{'\"])[ \t]*|(?<=[?&,;=:(])){_NAME}(?:=|:[ \t]*){_REST}", re.IGNORECASE),
    re.compile(rf"{_START}-{{0,2}}{_NAME}:(?=[^\s/]){_REST}", re.IGNORECASE),
)
_HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_|api_org_)(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{20,})")
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"]+@")
# an absolute path begins a word or a value, or follows a short option; the // of an address, "a/b" and "1 / 2" are none
_BEGINS = (
    r"(?:(?<=[\s='\"`(,;\[{@|>+&!*“‘—])|^|(?<=:)(?!//)|(?<=file://)|(?<=\s-[A-Za-z])|(?<=^-[A-Za-z])|(?<=\s['\"]-[A-Za-z]))"
)
_ROOT = r"(?:/+|[A-Za-z]:[\\/]+|\\\\)"
_PATH = re.compile(
    rf"(?:file://)?{_BEGINS}(?:(?<=')(?P<single>{_ROOT}[^'\n]+)(?=')|(?<=\")(?P<double>{_ROOT}[^\"\n]+)(?=\")"
    rf"|(?P<bare>{_ROOT}(?:\\[ ()&'\"]|[^\s'\"`,;:|)\]}}<>])+))"
)


def holds_hub_token(text: str) -> bool:
    """Whether there is something in the text that has the form of a token of the Hub."""
    return _HUB_TOKEN.search(text) is not None


def is_secret_name(name: str) -> bool:
    """Whether an option, an argument or a variable of that name is taken for a secret."""
    return _SECRET_NAME.fullmatch(name.lstrip("-")) is not None


def cleaned_text(text: str) -> str:
    """The text without tokens of the Hub and users of addresses; absolute paths are cut to their last name.

    Examples:
        >>> cleaned_text("made of /data/of/mine/train.json, see https://me:secret@example.org/a")
        'made of train.json, see https://example.org/a'
    """
    text = _HUB_TOKEN.sub("hf_…", _USER_OF_ADDRESS.sub("", text))
    return _PATH.sub(lambda found: _last_name(found["single"] or found["double"] or found["bare"]), text)


def cleaned_command(command: str) -> str:
    """`cleaned_text` of a command, without options and variables that are named like secrets; its layout stays.

    Examples:
        >>> cleaned_command("HF_TOKEN=abc python train.py --hub_token abc --file=/data/a.json --seed 0")
        'python train.py --file=a.json --seed 0'
    """
    for pattern in (*_WITHIN, *_SECRETS):
        command = pattern.sub("", command)
    return cleaned_text(command).strip()


def stated_command(program: str, arguments: Sequence[str], options: Collection[str]) -> str:
    """The command line, of which only the named options are stated, with their values; cleaned as `cleaned_command`.

    Args:
        program: what is run, such as "python -m scripts.finetune_text".
        arguments: the words after it.
        options: names that may be stated, without dashes and with underscores; those of secrets never are.

    Examples:
        >>> words = ["--seed", "0", "--hub-token", "abc", "--file=/data/a.json"]
        >>> stated_command("python train.py", words, {"seed", "file"})
        'python train.py --seed 0 --file=a.json'
    """
    kept: list[str] = []
    stated = True  # words before the first option
    for word in arguments:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            plain = name[2:].replace("-", "_")
            stated = plain in options or plain.removeprefix("no_") in options
            stated = stated and not is_secret_name(plain)
            word = f"{name}={_cleaned_value(value)}" if equals else name
        else:
            word = _cleaned_value(word)
        if stated:
            kept.append(word)
    return cleaned_command(" ".join([program, *map(shlex.quote, kept)]))


def cleaned_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that are named like secrets; texts are cleaned, names, mappings and lists too."""
    kept = {name: value for name, value in arguments.items() if not is_secret_name(str(name))}
    return {_cleaned_value(name) if isinstance(name, str) else name: _cleaned(value) for name, value in kept.items()}


def cleaned_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A card's record as it may be published: every text in it cleaned, its command and arguments without secrets."""
    found: dict[str, Any] = _texts_cleaned(record)
    details = record.get("details")
    if isinstance(details, Mapping):
        if details.get("command"):
            found["details"]["command"] = cleaned_command(details["command"])
        found["details"]["arguments"] = cleaned_arguments(details.get("arguments") or {})
    return found


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return cleaned_arguments(value)
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    return _cleaned_value(value) if isinstance(value, str) else value


def _cleaned_value(value: str) -> str:
    """A value that is one absolute path, blanks included, is its last name."""
    if re.match(_ROOT, value) and not re.search(r"[\n,:;](?![\\/])|\s[\\/]", value):
        return cleaned_text(_last_name(value))
    return cleaned_command(value)


def _texts_cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_texts_cleaned(name): _texts_cleaned(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_texts_cleaned(item) for item in value]
    return cleaned_text(value) if isinstance(value, str) else value


def _last_name(path: str) -> str:
    kind = PurePosixPath if path.startswith("/") else PureWindowsPath
    return kind(path.replace("\\ ", " ") if kind is PurePosixPath else path).name or path
