"""Read untrusted files without running code or trusting a declared size, and write files atomically."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import secrets
import shutil
import struct
import subprocess
import sys
import tokenize
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlora.archive import check_torch_archive, stored_entries
from fastlora.errors import CheckpointError, ConfigError

Content = bytes | memoryview | Callable[[BinaryIO], object]

MAX_JSON_BYTES = 2**24
MAX_YAML_BYTES = 2**20  # smaller than for JSON: parsing YAML is about a hundred times slower
MAX_DEPTH = 32

# Errors of torch.load and zipfile for a damaged file, besides OSError and ValueError.
_DAMAGED = (
    *(EOFError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(MemoryError, OverflowError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile),
)
_PLAIN = (type(None), bool, int, float, str)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file of at most `MAX_JSON_BYTES`.

    Raises: OSError; ValueError, with the reason in one line, if it is not JSON, too large or nested more than `MAX_DEPTH` deep.
    """
    data = _read_text(path, MAX_JSON_BYTES)
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_tree(value, len(data))
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, as `read_json` reads it. Raises: CheckpointError if the file is missing, damaged or holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value of a YAML file of at most `MAX_YAML_BYTES`: plain values, lists and mappings.

    Aliases are refused, because a few lines of them can expand beyond the memory.

    Raises: OSError; ValueError, with the reason in one line; ConfigError without pyyaml.
    """
    yaml = import_yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read")
            return super().compose_node(parent, index)

    data = _read_text(path, MAX_YAML_BYTES)
    try:
        value = yaml.load(data, Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    _check_tree(value, len(data) + 1)  # an empty file is a None
    return value


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Load a file of `torch.save` to the CPU without running code: plain values, lists, tuples, dicts and dense tensors.

    Checked before anything is allocated: the file is a zip archive of stored (not compressed) entries that are no larger than the
    file, and its pickle uses only the globals that such values need. Checked afterwards: no tensor is larger than its storage (a
    stride of 0 expands 4 bytes to terabytes), and shared values do not expand beyond the size of the file.

    Raises: OSError; ValueError with the reason in one line. Files of torch before 1.6 are refused.
    """
    size = _size(path)
    try:
        check_torch_archive(Path(path), size)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ValueError(_first_line(error)) from None
    _check_tree(value, size, tensors=True)
    return value


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of a file of `np.savez`, by name.

    Entries must be stored (not compressed) and as long as their header declares, so no more than the file's size is allocated;
    objects are refused.

    Raises: OSError; ValueError with the reason in one line.
    """
    size = _size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = stored_entries(archive, size, "np.savez")
            return {e.filename.removesuffix(".npy"): _npy(archive.read(e)) for e in entries}
    except _DAMAGED as error:
        raise ValueError(_first_line(error)) from None


def read_npz(
    path: str | os.PathLike[str], layout: Mapping[str, tuple[str, tuple[int | str, ...]]]
) -> dict[str, NDArray[Any]]:
    """`read_arrays`, checked against `layout`.

    layout: name → (dtype, shape); a side is a number, or a letter that stands for the same number everywhere.

    Raises: as `read_arrays`; ValueError naming the array that differs.
    """
    arrays = read_arrays(path)
    if arrays.keys() != layout.keys():
        raise ValueError(f"expected the arrays {', '.join(layout)}, got {', '.join(arrays)}")
    letters: dict[str, int] = {}
    for name, (dtype, shape) in layout.items():
        found = arrays[name]
        fits = found.dtype == np.dtype(dtype) and found.ndim == len(shape)
        for side, count in zip(shape, found.shape, strict=False):
            fits &= count == (letters.setdefault(side, count) if isinstance(side, str) else side)
        if not fits:
            raise ValueError(f"{name}: expected {dtype} {shape}, got {found.dtype} {found.shape}")
    return arrays


def _npy(data: bytes) -> NDArray[Any]:
    """The array of a `.npy` file. Raises: ValueError, and any of `_DAMAGED` for a damaged header."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected version 1.0 of numpy's format")
    try:
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    except (SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise ValueError(_first_line(error)) from None
    start = stream.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"expected {shape} values of {dtype}, got {len(data) - start} bytes")
    flat = np.frombuffer(bytearray(data), dtype, offset=start)  # a writable copy
    return flat.reshape(shape, order="F" if by_columns else "C")


def check_regexes(patterns: list[str], texts: Iterable[str], seconds: float = 10.0) -> None:
    """Match every pattern against every text in a process with a time limit: some patterns need exponential time.

    Raises: ValueError if it takes longer than `seconds`.
    """
    if not patterns:
        return
    given = json.dumps([patterns, list(texts)])
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        subprocess.run(command, input=given, text=True, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"a regex among {patterns} takes more than {seconds:g} s to match"
        ) from None


_MATCH = """
import json, re, sys
patterns, texts = json.load(sys.stdin)
for pattern in map(re.compile, patterns):
    for text in texts:
        pattern.match(text), pattern.fullmatch(text)
"""


def import_yaml() -> Any:
    """The module yaml. Raises: ConfigError if it is not installed."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            f"path: YAML needs the package pyyaml (pip install pyyaml): {error}"
        ) from error
    return yaml


def _size(path: str | os.PathLike[str]) -> int:
    file = Path(path)
    if not file.is_file():  # reading a pipe or a device may never end
        raise FileNotFoundError(f"no such file: {file}")
    return file.stat().st_size


def _read_text(path: str | os.PathLike[str], limit: int) -> bytes:
    size = _size(path)
    if size > limit:
        raise ValueError(f"expected at most {limit:,} bytes, got {size:,}")
    return Path(path).read_bytes()


def _check_tree(value: object, budget: int, tensors: bool = False) -> None:
    """Refuse anything but plain values, deep nesting, and trees of more than `budget` values.

    budget: the file's size in bytes, which bounds the values of a tree without sharing. A storage counts once.
    """
    storages: set[int] = set()
    stack: list[tuple[Iterator[object], int]] = [(iter([value]), 0)]
    count = stored = 0
    while stack:
        items, depth = stack[-1]
        item = next(items, stack)
        if item is stack:
            stack.pop()
            continue
        count += 1
        if count > budget:
            raise ValueError("holds more values than the file has bytes")
        if isinstance(item, (list, tuple, dict)):
            if depth >= MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} deep")
            pairs = (x for pair in item.items() for x in pair) if isinstance(item, dict) else item
            stack.append((iter(pairs), depth + 1))
        elif tensors and isinstance(item, Tensor):
            _check_tensor(item)
            storage = item.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                stored += storage.nbytes()
            if stored > budget:
                raise ValueError("holds larger tensors than the file")
        elif not isinstance(item, _PLAIN):
            raise ValueError(f"holds a {type(item).__name__}")
        elif isinstance(item, int) and item.bit_length() > 4096:
            raise ValueError("holds a number of more than 4,096 bits")


def _check_tensor(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"holds a tensor that is not dense on the CPU ({tensor.layout})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"holds a tensor {tuple(tensor.shape)} that is larger than its storage")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


LEFTOVERS = ".*.fastlora.tmp"
"""A glob for the temporary files of a process that was killed while writing."""


def atomic_write(path: Path, content: Content) -> None:
    """Write one file atomically: see `atomic_write_all`."""
    atomic_write_all({path: content})


def atomic_write_all(contents: Mapping[Path, Content]) -> None:
    """Write each file under a temporary name in its target's folder; when all are on the disk, rename them to their targets.

    The temporary name is unique and starts with a dot, so writers never share one and readers of `*.pt` do not see it. A symbolic
    link at a target is replaced, not followed. A replaced file's permissions are kept.

    contents: path → bytes, or a function that writes them to the open file. The folders must exist.

    Raises: OSError, and any error of a function. No file has changed then, unless a rename failed after an earlier one.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            name = temporary_name(path)
            with name.open("xb") as file:  # fails if the name exists, even as a symbolic link
                temporary[name] = path
                if path.is_file() and not path.is_symlink():  # no content before the permissions
                    name.chmod(path.stat().st_mode & 0o777 | 0o600)
                if callable(content):
                    content(file)
                else:
                    file.write(content)
        move_into_place(temporary)
    finally:
        for name in temporary:
            name.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A unique name in the folder of `path` that `LEFTOVERS` matches."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.fastlora.tmp")


def move_into_place(finished: Mapping[Path, Path]) -> None:
    """Rename files to their targets, once all are on the disk. finished: file → target, on one file system.

    Raises: OSError; FileExistsError for a device or a pipe, which a rename would remove. No file has changed then.
    """
    for place in finished.values():
        if place.exists() and not place.is_file() and not place.is_dir():
            raise FileExistsError(errno.EEXIST, "Not a file but a device or a pipe", str(place))
    for file, place in finished.items():
        _sync(file)
        _keep_mode(place, file)
    for file, place in finished.items():
        os.replace(file, place)
    for folder in {place.parent for place in finished.values()}:
        _sync(folder)  # makes a rename durable


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Context manager: a new, empty folder, which replaces `folder` if the block ends without an error.

    All files are on the disk before. The folder, and what it holds, has the permissions of what it replaces, and only its owner can
    read it until then. A process killed while replacing leaves the old folder, the new one, or none, and then both
    in a folder that `LEFTOVERS` matches.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    new, old = temporary / "new", temporary / "old"
    temporary.mkdir(0o700)
    new.mkdir()
    try:
        yield new
        for path in (*sorted(new.rglob("*"), reverse=True), new):  # what a folder holds first
            _sync(path)
            _keep_mode(folder / path.relative_to(new), path)
        if os.path.lexists(folder):
            os.replace(folder, old)
        os.replace(new, folder)
        _sync(folder.parent)
    finally:
        if os.path.lexists(old) and not os.path.lexists(folder):
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_mode(old: Path, new: Path) -> None:
    """Give `new` the permissions of the file or folder `old` that it replaces; a symbolic link has none of its own."""
    if (old.is_dir() if new.is_dir() else old.is_file()) and not old.is_symlink():
        shutil.copymode(old, new)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; only POSIX can open a folder."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(contents: Mapping[Path, Content]) -> None:
    """`atomic_write_all` for the files of an adapter or a configuration. Raises: CheckpointError if one cannot be written."""
    try:
        atomic_write_all(contents)
    except OSError as error:
        names = " and ".join(map(str, contents))
        raise CheckpointError(f"path: cannot write {names}: {error}") from error


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON. Raises: as `json_bytes`."""
    atomic_write(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """`value` as JSON. Raises: ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Raises: CheckpointError naming every tensor that is missing, unexpected or wrongly shaped.
    """
    problems = [f"{name}: missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name}: unexpected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name}: expected {tuple(wanted[name].shape)}, got {tuple(found[name].shape)}"
        for name in wanted.keys() & found.keys()
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the model: {'; '.join(sorted(problems))}")


def drop_output() -> None:
    """Discard what stdout has buffered, after writing to it failed: the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
