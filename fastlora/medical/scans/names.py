"""Names of structures, and of files that are made of subjects and structures."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastlora.errors import DataError

MAX_STEM_BYTES = 180
"""Of a file's name before its digest and ending: a file system takes 255 bytes, and temporary names are longer."""


def structure_name(label: str) -> str:
    """The name of a structure from its label, with letters and digits of any script: `Left Kidney` → `left_kidney`, `Größe` → `größe`."""
    label = unicodedata.normalize("NFC", unicodedata.normalize("NFC", label).lower())
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in label)
    return "_".join("".join(kept).split())


def distinct_names(labels: Sequence[tuple[str, object]], where: Path) -> list[str]:
    """The names of structures from their labels; if several are equal, as of `T1` and `T1+`, each gets its number.

    labels: text and number of each. where: for errors. Raises: DataError if two have the same text and number.
    """
    plain = [structure_name(text) or "label" for text, _ in labels]
    count = Counter(plain)
    names = [
        name if count[name] == 1 and structure_name(text) else f"{name}_{number}"
        for name, (text, number) in zip(plain, labels, strict=True)
    ]
    own = {name for name, before in zip(names, plain, strict=True) if name == before}
    for at, (text, number) in enumerate(labels):
        while names[at] != plain[at] and names[at] in own:  # another label has this very name
            names[at] += f"_{number}"
        if names.count(names[at]) > 1:
            raise DataError(f"{where}: expected labels with different names, got {text!r} twice")
    return names


def file_stem(*names: str) -> str:
    """The names joined by `-`, for a file's name.

    It ends in a digest if it is too long for a file system, or if a later name has a `-`, so that others could give the same.
    """
    stem = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", "-".join(names))
    if "-" in "".join(names[1:]):
        stem += f"-{hashlib.sha256(repr(names).encode()).hexdigest()[:8]}"
    data = stem.encode(errors="surrogateescape")
    if len(data) <= MAX_STEM_BYTES:
        return stem
    start = data[: MAX_STEM_BYTES - 17].decode(errors="ignore")  # not within a character
    return f"{start}-{hashlib.sha256(data).hexdigest()[:16]}"
