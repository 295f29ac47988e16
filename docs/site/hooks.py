"""Hooks of MkDocs: the pages that are not in docs/, and Markdown as GitHub reads it."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from reference import reference_pages

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOCS = ROOT / "docs"
TOP_LEVEL = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
IMAGES = {".png", ".svg", ".jpg"}

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
ITEM = re.compile(r" {0,3}([-*+]|\d+[.)]) +(?=\S)")
# A fenced block, an indented line, code within a line.
CODE = re.compile(
    r"(?s:^( *)(```+|~~~+).*?^\1\2 *$)|^ {4}.*$|(`+)(?!`).+?(?<!`)\3(?!`)", flags=re.M
)
EXAMPLE = re.compile(r"^\[[^\]]*\]\((examples/\w+\.py)\)$", flags=re.M)


def on_config(config: MkDocsConfig) -> None:
    """Complete the navigation: pages of docs/ that mkdocs.yml does not name, and the API reference."""
    groups = {name: pages for entry in config.nav for name, pages in entry.items()}
    named = {page for pages in groups.values() for entry in pages for page in _values(entry)}
    found = {path.name for path in DOCS.glob("*.md")}
    groups["Guides"] += sorted(found - named)
    pages = [{page.title: page.uri} for page in reference_pages()]
    config.nav.append({"API reference": pages})


def _values(entry: Any) -> list[str]:
    return list(entry.values()) if isinstance(entry, dict) else [entry]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages and assets from outside docs/."""
    for name, uri in TOP_LEVEL.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text()))
    for page in reference_pages():
        files.append(File.generated(config, page.uri, content=page.markdown))
    for name in ("iframe-worker.js", "style.css"):
        files.append(File.generated(config, f"site-assets/{name}", abs_src_path=str(HERE / name)))
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*")):
        if path.suffix in IMAGES:
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the examples that the page names, mend the links and write lists as Python-Markdown reads them."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    markdown = EXAMPLE.sub(lambda match: f"{match[0]}\n\n{example(DOCS / match[1])}", markdown)
    source = next((name for name, its in TOP_LEVEL.items() if its == uri), f"docs/{uri}")
    return python_markdown(outside_code(markdown, lambda text: mend_links(text, source, uri)))


def example(path: Path) -> str:
    return f"```python\n{path.read_text().rstrip()}\n```"


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the text with code replaced by marks, and put the code back."""
    code: list[str] = []

    def mark(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    marked = CODE.sub(mark, markdown)
    return re.sub("\0(\\d+)\0", lambda match: code[int(match[1])], change(marked))


def mend_links(markdown: str, source: str, uri: str) -> str:
    """The links of the repository's file `source` as those of the page `uri`.

    A link to a file that is not on the site becomes its text and path. One to a file that does not exist stays, so a strict build fails.
    """

    def mend(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if target.startswith("#") or re.match(r"[a-z]+:", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        full = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / full).exists():
            return match[0]
        if full in TOP_LEVEL:
            on_site = TOP_LEVEL[full]
        elif full.startswith("docs/") or image:
            on_site = full.removeprefix("docs/")
        else:
            return text if full in text or text == "\0" else f"{text} (`{full}`)"
        relative = os.path.relpath(on_site, posixpath.dirname(uri) or ".").replace(os.sep, "/")
        return f"{image}[{text}]({relative}{mark}{anchor})"

    return LINK.sub(mend, markdown)


def python_markdown(markdown: str) -> str:
    """GitHub's Markdown as Python-Markdown reads it.

    Python-Markdown needs a blank line before a list and a table, and the content of a list indented by 4 columns for each level.
    """
    lines: list[str] = []
    offsets: list[int] = []  # the columns at which the content of the open list items starts
    fence = ""
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if not line.strip():
            lines.append("")
            continue
        before = lines[-1].strip() if lines else ""
        if not fence:
            while offsets and indent < offsets[-1]:
                offsets.pop()
        start = offsets[-1] if offsets else 0
        content = line[min(start, indent) :]
        prefix = " " * (4 * len(offsets))
        opening = re.match(r" *(```+|~~~+)", content)
        if fence:
            fence = "" if content.strip() == fence else fence
        elif opening:
            fence = opening[1]
        elif item := ITEM.match(content):
            if before and not offsets and not _in_list(lines):
                lines.append("")
            offsets.append(start + item.end())
        elif (
            content.startswith("|")
            and before
            and not before.startswith("|")
            or content.startswith("<!--")
            and before
        ):
            lines.append("")
        lines.append(prefix + content)
    return "\n".join(lines)


def _in_list(lines: list[str]) -> bool:
    """Whether the last paragraph or list of `lines` is a list."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if ITEM.match(line):
            return True
    return False
