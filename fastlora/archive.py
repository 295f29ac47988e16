"""Zip archives of torch.save and np.savez: checks before anything in them is allocated."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

# Storage -> bytes of an item.
_STORAGES = {
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("BFloat16Storage", "HalfStorage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("ComplexFloatStorage", "DoubleStorage", "LongStorage"), 8),
    "ComplexDoubleStorage": 16,
}
# Globals that the pickle inside a file of torch.save may use. torch's own list also has constructors that allocate any size:
# `bytearray`, `torch.Tensor`, sparse tensors.
_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch.storage UntypedStorage",
    }
    | {f"torch {name}" for name in _STORAGES if name != "UntypedStorage"}
    | {str(value).replace(".", " ") for value in vars(torch).values() if isinstance(value, torch.dtype)}
)  # fmt: skip


def stored_entries(archive: zipfile.ZipFile, size: int, writer: str) -> list[zipfile.ZipInfo]:
    """The entries of an archive of `size` bytes, checked to be stored and no larger than it. writer: for the message."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"holds compressed entries, which {writer} does not write")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("declares more bytes than the file has")
    return entries


def check_torch_archive(path: Path, size: int) -> None:
    """Check the file of `torch.save` at `path`, of `size` bytes, before torch reads it.

    Raises: ValueError, or an error of zipfile or pickle, if it is not a zip archive of stored entries that torch and Python
    read alike, with one pickle that names only plain values and tensors, whose storages are as large as it states.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # torch would read anything else as a plain pickle
            raise ValueError("not a zip archive as torch.save writes it (since torch 1.6)")
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = stored_entries(archive, size, "torch.save")
        # torch ignores case, and some readers end a name at a null character
        names = [entry.filename.lower() for entry in entries]
        pickles = [n for n, name in enumerate(names) if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise ValueError(f"expected one data.pkl, got {len(pickles)}")
        _check_layout(file, archive, entries, size)
        program = archive.read(entries[pickles[0]])
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            raise ValueError(f"holds {argument!r}, which is neither a plain value nor a tensor")
        is_put = opcode.name.endswith("PUT")
        if is_put and isinstance(argument, int) and argument > len(program):
            raise ValueError("a pickle that asks for more memory than the file has bytes")
    folder = entries[pickles[0]].filename[: -len("data.pkl")]
    sizes = {entry.filename: entry.file_size for entry in entries}
    for key, stated in _Storages(program).sizes():
        stored = sizes.get(f"{folder}data/{key}", 0)
        if stored != stated:  # torch 2.6 would read memory beyond the entry
            raise ValueError(f"storage {key}: expected {stated} bytes, got {stored}")


class _Storages(pickle.Unpickler):
    """Runs a pickle with inert classes in place of the named ones, and collects the storages that it refers to."""

    def __init__(self, program: bytes) -> None:
        super().__init__(io.BytesIO(program))
        self._sizes: list[tuple[str, int]] = []
        self._classes: dict[str, type] = {}

    def sizes(self) -> list[tuple[str, int]]:
        """(key, bytes) of every storage."""
        self.load()
        return self._sizes

    def find_class(self, module: str, name: str) -> type:
        """A class that accepts whatever the pickle passes to `name`."""
        if f"{module} {name}" not in _GLOBALS:
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        inert = type(name, (dict,), {"__init__": lambda self, *_: None})
        return self._classes.setdefault(f"{module} {name}", inert)

    def persistent_load(self, pid: Any) -> None:
        """Collect ("storage", class, key, device, number of items)."""
        _, kind, key, _, count = pid
        self._sizes.append((key, count * _STORAGES[kind.__name__]))


def _check_layout(
    file: BinaryIO, archive: zipfile.ZipFile, entries: Iterable[zipfile.ZipInfo], size: int
) -> None:
    """Check that torch's reader finds the directory and the entries that Python's zipfile has found.

    torch reads the directory at the place that the end records state; zipfile takes the bytes before the end records.

    Raises: ValueError, or zipfile.BadZipFile, if the two may differ.
    """
    file.seek(max(0, size - 98))
    tail = file.read()
    zip64 = tail[-42:-38] == b"PK\6\7"
    end = size - (98 if zip64 else 22)
    tail = tail[end - size :]
    if zip64:
        tail = tail[:12] + bytes(4) + tail[16:]  # two version numbers, which nothing depends on
    if tail != _end_records(archive.start_dir, end, len(archive.infolist()), zip64):
        raise ValueError("the end of the archive does not state where its directory is")
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        archive.open(entry).close()  # compares the name in the entry's own header
        file.seek(entry.header_offset)
        *_, method, _, _, _, packed, full, name, extra = struct.unpack("<4s5H3L2H", file.read(30))
        stated = packed == full and full in (entry.file_size, 0, 2**32 - 1)  # or stated elsewhere
        one_zip64 = entry.extra[:4] == struct.pack("<HH", 1, max(0, len(entry.extra) - 4))
        fits = method == 0 and stated and entry.compress_size == entry.file_size
        if not fits or entry.header_offset < position or (entry.extra and not one_zip64):
            raise ValueError(f"{entry.filename}: its header does not fit the directory")
        position = entry.header_offset + 30 + name + extra + entry.file_size
    if position > archive.start_dir:
        raise ValueError("an entry of the archive reaches into its directory")


def _end_records(start: int, end: int, count: int, zip64: bool) -> bytes:
    """The end records of an archive without a comment whose directory lies from `start` to `end`."""
    short = min(count, 2**16 - 1), min(end - start, 2**32 - 1), min(start, 2**32 - 1)
    records = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short[0], *short, 0)
    if zip64:
        long = (b"PK\6\6", 44, 0, 0, count, count, end - start, start, b"PK\6\7", 0, end, 1)
        records = struct.pack("<4sQ4x2L4Q4sLQL", *long) + records
    return records
