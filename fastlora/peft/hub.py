"""Adapters on the Hugging Face Hub: the two files that `from_pretrained` reads, through huggingface_hub and its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastlora.errors import CheckpointError
from fastlora.peft.config import CONFIG_FILE, WEIGHTS_FILE

# "organisation/name", by the Hub's rules.
_ID = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9_]", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form "organisation/name" of an id on the Hub."""
    return _ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def local_folder(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder that holds an adapter; for the id of a repository on the Hub the files are downloaded unless they are in the cache.

    folder: a path, or a string "organisation/name". A folder of that name, or one that contains it, makes it a path.
    revision, token, cache_dir: as in `huggingface_hub.hf_hub_download`; unused for a path. subfolder: inside the folder or repository.

    Raises: CheckpointError if huggingface_hub is not installed, or the files cannot be found or downloaded.
    """
    path = Path(folder)
    inside = path / subfolder if subfolder else path
    local = not is_hub_id(str(folder)) or os.path.lexists(path.parent)
    if local or not isinstance(folder, str):
        return inside
    advice = f"; to load a local folder, pass a path to one that exists (there is no folder {path})"
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"folder: {folder} looks like the id of a repository on the Hugging Face Hub, which needs the package huggingface_hub "
            f"(pip install huggingface_hub): {error}{advice}"
        ) from error
    # The base of the HTTP client's errors, which a broken transfer raises and the module does not list.
    failures = (OSError, ValueError, errors.EntryNotFoundError, errors.HTTPError)  # type: ignore[attr-defined]
    cache = None if cache_dir is None else Path(cache_dir)
    commit = revision
    files: list[Path] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            found = hf_hub_download(
                folder, name, subfolder=subfolder, revision=commit, token=token, cache_dir=cache
            )
        except failures as error:
            where = f"{subfolder}/{name}" if subfolder else name
            at = "" if revision is None else f" at revision {revision!r}"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"folder: cannot get {where} of the repository {folder}{at} from the Hugging Face Hub or its cache: "
                f"{type(error).__name__}: {reason}{advice}"
            ) from error
        files.append(Path(found))
        # Both files are of one commit, whatever is pushed meanwhile: the cache holds snapshots/<commit>/<subfolder>/<name>.
        commit = files[0].parents[len(Path(subfolder or "").parts)].name
    return files[0].parent
