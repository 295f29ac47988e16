"""The files of a base model: which hold weights, which are copied beside them, and the header of a safetensors file."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.files import read_json, read_json_object
from fastlora.io.kohya_names import COMPONENTS

_INDEX_SUFFIX = ".index.json"
# As transformers and diffusers look for them.
_WEIGHTS = tuple(
    f"{name}.safetensors{end}"
    for name in ("model", "diffusion_pytorch_model")
    for end in ("", _INDEX_SUFFIX)
)
_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Files of other formats would hold the weights before the merge.
_WEIGHT_SUFFIXES = (
    *(".safetensors", _INDEX_SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"),
    *(".gguf", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz"),
)


class Entry(NamedTuple):
    """One tensor of a safetensors file: its dtype as in the file, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class BaseFiles(NamedTuple):
    """The files of a base model.

    weights: safetensors files. copied: the files to copy as they are, such as the index, config.json and the tokenizer's.
    is_folder: whether they belong into a folder. config: the content of config.json beside the weights, {} without one.
    """

    weights: list[Path]
    copied: list[Path]
    is_folder: bool
    config: dict[str, Any]


def find_base(base: Path) -> BaseFiles:
    """The files of a base: one safetensors file, the `*.index.json` of a sharded one, or a folder of transformers' `save_pretrained`.

    Of a folder every file is copied except hidden ones and weights in other formats; subfolders are not copied. Warns of what is not.

    Raises: CheckpointError if the folder has no safetensors weights or is an adapter's, or if an index or config.json is damaged.
    """
    if not base.is_dir():
        config = _read_config(base.parent / _CONFIG)
        if not base.name.endswith(_INDEX_SUFFIX):
            return BaseFiles([base], [], False, config)
        return BaseFiles(_shards(base), [base], True, config)
    if (base / _ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{base}: holds {_ADAPTER_CONFIG}: expected a base model's folder")
    found = next((base / name for name in _WEIGHTS if (base / name).is_file()), None)
    visible = sorted(path for path in base.iterdir() if not path.name.startswith("."))
    weights = [path for path in visible if path.name.endswith(_WEIGHT_SUFFIXES)]
    if found is None:
        other = f"; {weights[0].name} is not read, save the model as safetensors" if weights else ""
        raise CheckpointError(f"{base}: expected {' or '.join(_WEIGHTS)}{other}")
    files, index, _, config = find_base(found)
    copied = [path for path in visible if path.is_file() and path not in weights]
    left = [path.name for path in visible if path not in (*copied, *files, found)]
    if left:
        warnings.warn(f"{base}: not copied: {', '.join(left)}", FastLoRAWarning, stacklevel=2)
    return BaseFiles(files, copied + index, True, config)


def layers_of_base(base: Path) -> dict[str, set[str]]:
    """Component → the paths of the layers of a base model: of the models in a pipeline's folder, or "" of one model (as `find_base`).

    Raises: CheckpointError if a file is missing or damaged.
    """
    folders = {name: base / name for name in COMPONENTS if (base / name).is_dir()}
    found = {}
    for name, folder in (folders or {"": base}).items():
        files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
        if folder.name.endswith(_INDEX_SUFFIX):
            files = _shards(folder)
        if not files:
            raise CheckpointError(f"--base: no safetensors file: {folder}")
        keys = {key for file in files for key in read_header(file)}
        found[name] = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    return found


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file, after safetensors has checked that offsets, shapes and the file's size agree.

    Raises: CheckpointError if the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    entries = {}
    for key, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        entries[key] = Entry(entry["dtype"], tuple(entry["shape"]), begin, end)
    return entries


def _shards(index: Path) -> list[Path]:
    """The files of a sharded base, each once."""
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        plain = all(name == Path(name).name and name.endswith(".safetensors") for name in files)
        # allowed by file systems
        usable = all("\0" not in name and len(os.fsencode(name)) <= 255 for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index: {error!r}") from None
    if not (files and plain and usable):
        raise CheckpointError(
            f"{index}: weight_map: expected names of .safetensors files in the same folder"
        )
    return [index.parent / name for name in files]


def _read_config(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}
