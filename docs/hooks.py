"""Hooks of the site's build: pages that are files of the repository's root, and links to files that are no pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
# page → the file that it shows: one text, read on the Hub of code and on the site
SHOWN = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PAGES = {shown: page for page, shown in SHOWN.items()} | {"README.md": "index.md"}
_LINK = re.compile(
    r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The file in place of the page that stands for it; links as they lead from the page."""
    source = page.file.src_uri
    shown = SHOWN.get(source)
    if shown is not None:
        if not (ROOT / shown).is_file():
            raise PluginError(
                f"docs/{source} shows {shown}, which the repository's root does not have"
            )
        markdown = (ROOT / shown).read_text(encoding="utf-8")
    here = "" if shown is not None else posixpath.dirname(f"docs/{source}")
    return _LINK.sub(lambda match: _link(match, here, source), markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """A public name is a function or a class; where a module has its name too, the module is what would be shown."""
    if 'class="doc doc-object doc-module"' in html:
        raise PluginError(
            f"docs/{page.file.src_uri}: a public name of hf_lambda_gelu is a module's name too"
        )
    return html


def _link(match: re.Match[str], here: str, source: str) -> str:
    """A link to a page leads there; a file of the repository that is no page is named, as the site does not hold it."""
    target = match["target"]
    if re.match(r"[a-z]+:", target):
        return match[0]
    path = posixpath.normpath(posixpath.join(here, target))
    page = PAGES.get(path)
    if page is None and path.startswith("docs/"):
        page = path.removeprefix("docs/")
    if page is not None:
        return f"[{match['text']}]({posixpath.relpath(page, posixpath.dirname(source) or '.')}{match['anchor'] or ''})"
    if not (ROOT / path).exists():
        return match[0]  # mkdocs says that it leads nowhere
    return (
        f"`{path}`"
        if path.endswith(match["text"].strip("`"))
        else f"{match['text']} (`{path}`)"
    )
