"""Text that a user wrote, as a Markdown page shows it and does not obey it: no HTML, no link, no end of a block of code."""

from __future__ import annotations

import re
from typing import Any

_MARKS = re.compile(r"[\\`*\[\]|]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_TICKS = re.compile("`+")


def inline(value: Any) -> str:
    """A piece of a line, of a heading or of a table's cell."""
    text = " ".join(str(value).split())
    return _MARKS.sub(lambda mark: f"\\{mark[0]}", text.replace("&", "&amp;").replace("<", "&lt;"))


def paragraphs(value: Any) -> str:
    """Markdown, without HTML."""
    return _TAG.sub("&lt;", str(value))


def code(value: Any) -> str:
    """Code in a line."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + _longest(text))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def block(value: Any) -> str:
    """A block of code."""
    fence = "`" * max(3, 1 + _longest(str(value)))
    return f"{fence}\n{value}\n{fence}"


def _longest(text: str) -> int:
    return max(map(len, _TICKS.findall(text)), default=0)
