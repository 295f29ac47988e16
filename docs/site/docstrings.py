"""A griffe extension that writes fastlora's docstrings as Markdown.

Their convention (CONTRIBUTING.md): a summary; arguments as `name: meaning`, with further lines indented; `Raises:`, `Returns` and `Source:`
at the start of a line or a sentence. Markdown would join these lines to one paragraph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import griffe
from pymdownx.slugs import slugify

import fastlora

DOCS = Path(__file__).parents[1]
PUBLIC = {name: f"fastlora.{name}" for name in fastlora.__all__}

NAMES = r"[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*"
CODE = re.compile(r"(`+)(.+?)\1")
PAGE = re.compile(r"docs/(\w+\.md)")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
ERROR = re.compile(r"\b(?:[A-Z]\w*(?:Error|Warning)|KeyboardInterrupt)\b")
TERM = re.compile(r"(\"[^\"]+\"|\S+) {2,}(\S.*)")


@dataclass
class Entry:
    """A paragraph, an argument or a section of a docstring: its own text, then lines as they are indented below it."""

    kind: str  # "text", "item", "Raises", "Returns" or "Source"
    text: str
    names: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)


class Docstrings(griffe.Extension):
    """Rewrites each docstring of fastlora."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is None or obj.is_module:
            return
        names, heading = _documented(obj)
        obj.docstring.value = to_markdown(obj.docstring.value, names, heading, own=obj.name)


def _documented(obj: griffe.Object) -> tuple[set[str], str]:
    """The names that the docstring of `obj` may explain, and what they are."""
    if obj.is_function:
        return {parameter.name for parameter in obj.parameters}, "Arguments"
    if not obj.is_class:
        return set(), "Arguments"
    fields = {name for name, member in obj.members.items() if member.is_attribute}
    if "__init__" in obj.members:
        parameters = obj.members["__init__"].parameters
        return fields | {parameter.name for parameter in parameters}, "Arguments"
    return fields, "Fields"


def to_markdown(docstring: str, names: set[str], heading: str = "Arguments", own: str = "") -> str:
    """`docstring` as Markdown.

    names: the arguments or fields that it may explain. heading: above their list.
    own: the name of the object, which is not made a link.
    """
    parts: list[str] = []
    previous = ""
    for entry in _entries(docstring, names):
        if entry.kind == "item":
            bullet = _bullet(entry, own)
            parts += [bullet] if previous == "item" else [f"**{heading}**", bullet]
        elif entry.kind == "Raises":
            bullets = [f"- {_prose(text, own)}" for text in _errors(_joined(entry))]
            parts += ["**Raises**", "\n".join(bullets)]
        elif entry.kind in ("Returns", "Source"):
            parts.append(f"**{entry.kind}** {_prose(_joined(entry), own)}")
        else:
            parts.append(_prose(entry.text, own))
            if entry.below:
                parts.append("\n".join(f"- {_prose(line, own)}" for line in _clauses(entry.below)))
        previous = entry.kind
    return "\n\n".join(parts)


def _entries(docstring: str, names: set[str]) -> list[Entry]:
    entries: list[Entry] = []
    current: Entry | None = None
    last = ""
    for line in docstring.strip().splitlines():
        if not line.strip():
            current, last = None, ""
            continue
        if line.startswith(" ") and current is not None:
            current.below.append(line)
        elif (new := _start(line, names, current, last, not entries)) is not None:
            entries.append(new)
            current = new
        elif current is None or current.below and current.kind == "text":
            current = Entry("text", line.strip())
            entries.append(current)
        elif current.below:
            current.below.append(_indent(current.below[-1]) + line.strip())
        else:
            current.text += " " + line.strip()
        last = line.rstrip()
    parts = [part for entry in entries for part in _split(entry, names)]
    for place in range(len(parts) - 2, 0, -1):  # arguments first, so that they are one list
        if [part.kind for part in parts[place - 1 : place + 2]] == ["item", "Returns", "item"]:
            parts[place : place + 2] = parts[place + 1], parts[place]
    return parts


def _start(
    line: str, names: set[str], current: Entry | None, last: str, first: bool
) -> Entry | None:
    """The entry that begins with `line`, or None if the line continues the current one."""
    match = re.match(rf"({NAMES}):(?: |$)", line)
    if match and set(match[1].split(", ")) <= names:
        return Entry("item", line[match.end() :], match[1].split(", "))
    for kind in ("Raises", "Source"):
        if line.startswith(f"{kind}:"):
            return Entry(kind, line.removeprefix(f"{kind}:").strip())
    ended = current is not None and last.endswith((".", ":", ";"))
    if line.startswith("Returns ") and (ended or current is None and not first):
        return Entry("Returns", line.removeprefix("Returns "))
    if ended and line.startswith("Warns "):
        return Entry("text", line)
    if ended and current is not None and current.kind != "text" and last.endswith("."):
        if current.kind == "Raises" and ERROR.match(line):
            return None
        return Entry("text", line)
    return None


def _split(entry: Entry, names: set[str]) -> list[Entry]:
    """`entry` without the arguments and sections that begin at a sentence within its text."""
    if entry.kind not in ("text", "item"):
        return [entry]
    starts = [match.start() for match in re.finditer(r"(?<=[.;)] )(?=Raises: )", entry.text)]
    starts += [
        match.start()
        for match in re.finditer(rf"(?<=[.;] )({NAMES})(?=: )", entry.text)
        if set(match[1].split(", ")) <= names
    ]
    if entry.kind == "item":
        starts += [match.start() for match in re.finditer(r"(?<=\. )(?=Returns )", entry.text)]
    if not starts:
        return [entry]
    first = min(starts)
    kept = entry.text[:first].strip()
    rest = entry.text[first:]
    match = re.match(rf"(Raises|Returns|{NAMES}):? ", rest)
    assert match is not None, rest
    word, text = match[1], rest[match.end() :]
    if word in ("Raises", "Returns"):
        following = Entry(word, text, below=entry.below)
    else:
        following = Entry("item", text, word.split(", "), entry.below)
    return [Entry(entry.kind, kept, entry.names), *_split(following, names)]


def _indent(line: str) -> str:
    return " " * (len(line) - len(line.lstrip()))


def _joined(entry: Entry) -> str:
    return " ".join([entry.text, *(line.strip() for line in entry.below)]).strip()


def _clauses(lines: list[str]) -> list[str]:
    """Indented lines below a sentence: each clause that ends with a semicolon or full stop."""
    clauses: list[str] = []
    for line in lines:
        if clauses and not clauses[-1].endswith((";", ".")):
            clauses[-1] += " " + line.strip()
        else:
            clauses.append(line.strip())
    return clauses


def _errors(text: str) -> list[str]:
    """What each error of a `Raises:` is raised for."""
    outside = r"(?![^()]*\))"  # not within parentheses, which list the kinds of one error
    parts = re.split(
        rf"(?<=[;,.])\s+(?:and )?(?={ERROR.pattern}){outside}|(?<=;)\s+(?=whatever\b)", text
    )
    return [part.rstrip(";,") for part in parts]


def _bullet(entry: Entry, own: str) -> str:
    """A list item: the names, the text, and the values of the argument as a list of their own, with what follows them."""
    names = ", ".join(f"`{name}`" for name in entry.names)
    first, values, after = [entry.text], [], []
    base = len(_indent(entry.below[0])) if entry.below else 0
    into = first
    for line in entry.below:
        deeper = len(_indent(line)) > base
        found = None if deeper else TERM.fullmatch(line.strip())
        if found:
            into = [found[2]]
            values.append((found[1], into))
        else:
            if values and not deeper:
                into = after
            into.append(line.strip())
    lines = [f"- {names}: {_prose(' '.join(first), own)}"]
    lines += [f"    - `{term}`: {_prose(' '.join(text), own)}" for term, text in values]
    if after:
        lines += ["", f"    {_prose(' '.join(after), own)}"]
    return "\n".join(lines)


def _prose(text: str, own: str) -> str:
    """Text with Markdown's special characters escaped and links to public names, pages and papers."""
    out, end = [], 0
    for match in CODE.finditer(text):
        out += [_plain(text[end : match.start()], own), _code(match[0], match[2], own)]
        end = match.end()
    return "".join([*out, _plain(text[end:], own)])


def _code(code: str, name: str, own: str) -> str:
    short = name.removeprefix("fastlora.").removesuffix("()")
    return f"[{code}][{PUBLIC[short]}]" if short in PUBLIC and short != own else code


def _plain(text: str, own: str) -> str:
    text = re.sub(r"([\\*_\[\]{}#])", r"\\\1", text).replace("<", "&lt;")
    text = ERROR.sub(lambda match: _code(f"`{match[0]}`", match[0], own), text)
    text = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return PAGE.sub(_page, text.replace(r"\_", "_") if "docs/" in text else text)


def _page(match: re.Match[str]) -> str:
    """A link to the first heading of a page, by its anchor."""
    title = (DOCS / match[1]).read_text().partition("\n")[0].removeprefix("# ")
    return f"[{title}][{slugify(case='lower')(title, '-')}]"
