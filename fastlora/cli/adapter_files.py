"""Adapters as files, without a model: read any scheme, write another, merge into a base file, compare.

Schemes: "fastlora" (one safetensors file, keys `<path>.lora_A`, alpha and the rest in its metadata), "peft" (a folder), and
"loralib" (one safetensors file with the same keys and no alpha). Pickles are not read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastlora.config import LoRAConfig, check_hyperparameters, scaling_divisor
from fastlora.errors import CheckpointError, ConfigError, FastLoRAWarning, nearest
from fastlora.files import move_into_place, read_json, write_files
from fastlora.io.checkpoint import _METADATA_KEY, read_safetensors, safetensors_bytes
from fastlora.peft.config import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    as_json,
    config_for,
    overlap,
    read_config,
)

SCHEMES = ("fastlora", "peft", "loralib")
_INDEX_SUFFIX = ".index.json"
_FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's update, scaling · B A.

    lora_a: (R, K). lora_b: (N, R). alpha: None where the file does not say it. dropout and use_rslora as in `LoRALinear`.
    """

    lora_a: Tensor
    lora_b: Tensor
    alpha: float | None
    use_rslora: bool = False
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def scaling(self) -> float:
        """The applied factor. Raises: CheckpointError if alpha is unknown."""
        if self.alpha is None:
            raise CheckpointError("alpha: the file does not hold it; give it with --alpha")
        return self.alpha / scaling_divisor(self.rank, self.use_rslora)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's file or folder holds: its layers by path, and the other tensors saved with them (heads) by name."""

    source: Path
    scheme: str
    layers: dict[str, AdapterLayer]
    others: dict[str, Tensor]


@dataclass(frozen=True)
class MergedLayer:
    """What merging one layer did: its path, the weight's dtype, and the share ‖rounding‖ / ‖scaling · B A‖ that was lost."""

    path: str
    dtype: torch.dtype
    lost: float


def read_adapter(source: Path, alpha: float | None = None) -> Adapter:
    """Read a safetensors file, or a folder in PEFT's format.

    alpha: for a file that does not hold it. Raises: CheckpointError if the source is no adapter, is damaged, or says its
    own alpha while one is given; ConfigError for a value that cannot work.
    """
    if source.is_dir():
        adapter = _read_peft(source)
    elif not source.is_file():
        raise CheckpointError(f"no such file or folder: {source}")
    elif source.name == WEIGHTS_FILE and (source.parent / CONFIG_FILE).is_file():
        adapter = _read_peft(source.parent)
    elif source.suffix != ".safetensors":
        raise CheckpointError(
            f"{source}: expected a .safetensors file or a folder in PEFT's format; pickles (.pt, .bin) are not read: "
            "use fastlora.load_adapter and save_adapter in Python"
        )
    else:
        adapter = _read_file(source)
    if alpha is None:
        return adapter
    if any(layer.alpha is not None for layer in adapter.layers.values()):
        raise CheckpointError(f"--alpha: {source} holds its own alpha")
    layers = {path: replace(layer, alpha=alpha) for path, layer in adapter.layers.items()}
    for layer in layers.values():
        check_hyperparameters(layer.rank, alpha, layer.dropout)
    return replace(adapter, layers=layers)


def convert(
    adapter: Adapter, target: Path, scheme: str, *, force: bool, alpha: float | None
) -> None:
    """Write `adapter` to `target` (a folder for "peft", else a file) under another scheme's keys.

    force: replace what is there. alpha: only for "loralib", whose files do not hold it: the `lora_alpha` with which the
    loralib model is built. It must be what every layer has.

    Raises: CheckpointError if alpha is unknown or would be lost, if PEFT's format cannot say the rest, or if the target
    exists or cannot be written. Nothing is written then.
    """
    for layer in adapter.layers.values():
        _ = layer.scaling  # raises where alpha is unknown
    if scheme == "peft":
        files = _peft_files(adapter, target)
    elif target.is_dir():
        raise CheckpointError(f"{target}: is a folder; expected the name of a file to write")
    elif scheme == "loralib":
        _refuse_losing_alpha(adapter, alpha)
        files = {target: safetensors_bytes(_flat_state(adapter), {"format": "pt"})}
    else:
        files = _fastlora_files(adapter, target)
    _refuse_existing(files, force)
    if scheme == "peft":
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {target}: {error}") from error
    write_files(files)


def merge_files(base: Path, adapter: Adapter, target: Path, *, force: bool) -> list[MergedLayer]:
    """Write a copy of the `base` weights with the adapter merged, one layer in memory at a time.

    W + scaling · B A is summed in float32 or wider and rounded once to the dtype of W. Heads saved with the adapter take
    the place of the base's. Everything else, metadata included, is copied byte by byte.

    base: a safetensors file, or the `*.index.json` of a sharded one; then `target` is a folder that gets shards and index.

    Raises: CheckpointError if a layer or head is not in the base or does not fit, with the nearest key; if a weight is not
    16 to 64 bit float; or if the target exists without `force`. Nothing is written then.
    """
    sharded = base.name.endswith(_INDEX_SUFFIX)
    names = _shards(base) if sharded else [base.name]
    if sharded and target.exists() and not target.is_dir():
        raise CheckpointError(
            f"{target}: a sharded base needs a folder to write to; this is a file"
        )
    if not sharded and target.is_dir():
        raise CheckpointError(f"{target}: is a folder; expected the name of a file to write")
    places = {name: target / name if sharded else target for name in names}
    if sharded:
        places[base.name] = target / base.name
    _refuse_existing(places.values(), force)
    headers = {name: _header(base.parent / name) for name in names}
    homes = {key: name for name in names for key in headers[name]}
    _check_fit(adapter, {key: headers[name][key] for key, name in homes.items()})
    merged = []
    folder = target if sharded else target.parent
    made = sharded and not folder.exists()
    try:
        if made:
            folder.mkdir()
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=folder) as temporary:
            for name in places:
                copied = Path(temporary) / name
                shutil.copyfile(base.parent / name, copied)
                if name in headers:
                    merged += _merge_into(copied, adapter)
            # The index, if there is one, comes last.
            move_into_place({Path(temporary) / name: place for name, place in places.items()})
    except OSError as error:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return merged


def update_norm(layer: AdapterLayer) -> float:
    """‖B A‖, the Frobenius norm, in float64 without forming the product."""
    return _product_norm(layer.lora_b.double(), layer.lora_a.double())


def difference_norm(a: AdapterLayer, b: AdapterLayer) -> float:
    """‖scaling_a · B_a A_a − scaling_b · B_b A_b‖. Raises: CheckpointError if the layers' sizes differ or an alpha is unknown."""
    if a.lora_a.shape[1] != b.lora_a.shape[1] or a.lora_b.shape[0] != b.lora_b.shape[0]:
        raise CheckpointError("the layers have different sizes")
    left = torch.cat([a.scaling * a.lora_b.double(), -b.scaling * b.lora_b.double()], 1)
    return _product_norm(left, torch.cat([a.lora_a.double(), b.lora_a.double()]))


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖ through the triangles of QR: small differences of large updates keep their digits."""
    r1, r2 = torch.linalg.qr(left, "r").R, torch.linalg.qr(right.T, "r").R
    return float(torch.linalg.matrix_norm(r1 @ r2.T))


def _read_file(file: Path) -> Adapter:
    state, metadata = read_safetensors(file)
    if any(key.startswith(PREFIX) and ".lora_" in key for key in state):
        raise CheckpointError(
            f"{file}: holds PEFT's weights, whose alpha stands in {CONFIG_FILE}; give the folder that holds both"
        )
    pairs, others = _pairs(file, state, "")
    if metadata.keys() - pairs.keys():
        path = min(metadata.keys() - pairs.keys())
        raise CheckpointError(f"{file}: the metadata names {path!r}, and no tensors do")
    layers = {}
    for path, (a, b) in pairs.items():
        if not metadata:
            layers[path] = AdapterLayer(a, b, None)
            continue
        values: dict[str, Any] = {"use_rslora": False, "dropout": 0.0} | metadata.get(path, {})
        rank, stabilised = values.get("rank"), values["use_rslora"]
        if values.get("kind", "linear") != "linear":  # older files have linear layers only
            raise CheckpointError(
                f"{file}: {path} is of the kind {values['kind']!r}; these functions take linear layers, "
                "fastlora.load_adapter takes it"
            )
        try:
            check_hyperparameters(rank, values.get("alpha"), values["dropout"])  # type: ignore[arg-type]
        except ConfigError as error:
            raise CheckpointError(f"{file}: metadata of {path}: {error}") from None
        if rank != a.shape[0] or not isinstance(stabilised, bool):
            raise CheckpointError(
                f"{file}: metadata of {path}: expected rank={a.shape[0]} and use_rslora true or false, "
                f"got {rank!r} and {stabilised!r}"
            )
        layer = AdapterLayer(a, b, float(values["alpha"]), stabilised, values["dropout"])
        layers[path] = _with_start(file, path, layer, others)
    return Adapter(file, "fastlora" if metadata else "loralib", layers, others)


def _with_start(
    file: Path, path: str, layer: AdapterLayer, others: dict[str, Tensor]
) -> AdapterLayer:
    """The layer with the start that PiSSA or OLoRA takes off as part of its update, at twice the rank; it is taken out of `others`."""
    keys = [f"{path}.initial_{factor}".lstrip(".") for factor in "AB"]
    start = [others.pop(key) for key in keys if key in others]
    if not start:
        return layer
    if [s.shape for s in start] != [layer.lora_a.shape, layer.lora_b.shape]:
        raise CheckpointError(
            f"{file}: {path}: expected initial_A and initial_B in the shapes of lora_A and lora_B"
        )
    a, b = torch.cat([layer.lora_a, start[0]]), torch.cat([layer.lora_b, -start[1]], 1)
    alpha = layer.scaling * scaling_divisor(a.shape[0], layer.use_rslora)
    return replace(layer, lora_a=a, lora_b=b, alpha=alpha)


def _read_peft(folder: Path) -> Adapter:
    config = read_config(folder / CONFIG_FILE)
    if config.use_dora:
        raise CheckpointError(f"{folder}: use_dora=True: only fastlora.from_pretrained reads DoRA")
    if config.fan_in_fan_out:
        raise CheckpointError(
            f"{folder}: fan_in_fan_out=True: the weights are those of Conv1D layers, stored transposed; only "
            "fastlora.from_pretrained reads them"
        )
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"no such file: {file}; only safetensors are read")
    state, _ = read_safetensors(file)
    foreign = [key for key in state if not key.startswith(PREFIX)]
    if foreign:
        raise CheckpointError(f"{file}: expected keys that start with {PREFIX}, got {foreign[0]!r}")
    plain = {key.removeprefix(PREFIX): value for key, value in state.items()}
    pairs, others = _pairs(file, plain, ".weight")
    config.check_matching(pairs)
    layers = {}
    for path, (a, b) in pairs.items():
        chosen = config.layer(path)
        if chosen.rank != a.shape[0]:
            raise CheckpointError(
                f"{folder}: {path} has rank {a.shape[0]} in the weights, {chosen.rank} in the config"
            )
        layers[path] = AdapterLayer(a, b, chosen.alpha, chosen.use_rslora, chosen.dropout)
    return Adapter(folder, "peft", layers, others)


def _pairs(
    file: Path, state: Mapping[str, Tensor], suffix: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Every (A, B) by path, and what else there is. Raises: CheckpointError if a pair is incomplete or does not fit together."""
    pairs, others = {}, {}
    for key, value in state.items():
        path, _, name = key.removesuffix(suffix).rpartition(".")
        if not key.endswith(suffix) or name not in ("lora_A", "lora_B"):
            if "lora_" in key.rpartition(".")[2] or ".lora_" in key:
                raise CheckpointError(
                    f"{file}: {key} is of a kind of LoRA that these functions do not do: they take linear layers "
                    "without DoRA; fastlora.from_pretrained and load_adapter take more"
                )
            others[key] = value
            continue
        partner = key.removesuffix(suffix)[:-1] + ("B" if name == "lora_A" else "A") + suffix
        if partner not in state:
            raise CheckpointError(f"{file}: {key} is there without {partner}")
        if name == "lora_A":
            pairs[path] = value, state[partner]
    if not pairs:
        raise CheckpointError(f"{file}: holds no lora_A and lora_B, so it is no adapter")
    for path, (a, b) in pairs.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise CheckpointError(
                f"{file}: {path}: expected lora_A (R, K) and lora_B (N, R), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            raise CheckpointError(
                f"{file}: {path}: expected float tensors, got {a.dtype}, {b.dtype}"
            )
    return {path: pairs[path] for path in sorted(pairs, key=_natural)}, others


def _natural(path: str) -> list[tuple[int, str]]:
    """A sorting key by which `blocks.2` comes before `blocks.10`."""
    return [(len(p), p) if p.isdecimal() else (0, p) for p in path.split(".")]


def _flat_state(adapter: Adapter) -> dict[str, Tensor]:
    state = dict(adapter.others)
    for path, layer in adapter.layers.items():
        state[f"{path}.lora_A".lstrip(".")] = layer.lora_a
        state[f"{path}.lora_B".lstrip(".")] = layer.lora_b
    return state


def _fastlora_files(adapter: Adapter, target: Path) -> dict[Path, bytes]:
    layers = {
        path: {
            "rank": layer.rank,
            "alpha": layer.alpha,
            "dropout": layer.dropout,
            "use_rslora": layer.use_rslora,
        }
        for path, layer in adapter.layers.items()
    }
    metadata = {"format": "pt", _METADATA_KEY: json.dumps({"version": 1, "layers": layers})}
    return {target: safetensors_bytes(_flat_state(adapter), metadata)}


def _peft_files(adapter: Adapter, folder: Path) -> dict[Path, bytes]:
    if "" in adapter.layers:
        raise CheckpointError(
            "the adapted layer is the whole model; PEFT's format needs it to have a name"
        )
    heads = sorted({name.rpartition(".")[0] for name in adapter.others})
    for head in heads:
        held = overlap(head, adapter.layers) if head else None
        if not head or held:
            what = f"with the adapted {held}" if held else "of the model itself"
            raise CheckpointError(
                f"{adapter.source}: holds a tensor {what}, which PEFT's format cannot say"
            )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; PEFT's format is a folder")
    layers = {
        path: LoRAConfig(
            rank=layer.rank,
            alpha=layer.scaling * scaling_divisor(layer.rank, layer.use_rslora),
            dropout=layer.dropout,
            use_rslora=layer.use_rslora,
        )
        for path, layer in adapter.layers.items()
    }
    dropouts = sorted({layer.dropout for layer in layers.values()})
    if len(dropouts) > 1:
        warnings.warn(
            f"layers have the dropouts {dropouts}, PEFT's format holds one; {dropouts[-1]} is written",
            FastLoRAWarning,
            stacklevel=2,
        )
    # A regex that is the paths themselves: no rule of PEFT can find more or less than these.
    regex = "|".join(re.escape(path) for path in layers)
    config = config_for(regex, layers, heads)
    state = {PREFIX + name: value for name, value in adapter.others.items()}
    for path, layer in adapter.layers.items():
        state[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_a
        state[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_b
    text = json.dumps(as_json(config, nn.Module()), indent=2, sort_keys=True) + "\n"
    return {
        folder / WEIGHTS_FILE: safetensors_bytes(state, {"format": "pt"}),
        folder / CONFIG_FILE: text.encode(),
    }


def _refuse_losing_alpha(adapter: Adapter, alpha: float | None) -> None:
    """loralib's files hold no alpha: whoever builds the model must say the one that these layers were trained with."""
    needed = {path: layer.scaling * layer.rank for path, layer in adapter.layers.items()}
    values = sorted(set(needed.values()))
    if len(values) > 1:
        raise CheckpointError(
            f"alpha: the layers have {len(values)} different ones ({values[0]:g} to {values[-1]:g}), "
            "and loralib's files hold none"
        )
    if alpha is None or not math.isclose(alpha, values[0], rel_tol=1e-6):
        given = "" if alpha is None else f", not {alpha:g}"
        raise CheckpointError(
            f"alpha: loralib's files do not hold it and it would be lost; build the loralib model with "
            f"lora_alpha={values[0]:g}{given}, and say so with --alpha {values[0]:g}"
        )


def _refuse_existing(targets: Iterable[Path], force: bool) -> None:
    for target in targets:
        if target.exists() and not force:
            raise CheckpointError(f"{target}: exists; --force replaces it")


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors file: its dtype as the file writes it, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(file: Path) -> dict[str, _Entry]:
    """The tensors of a file, after safetensors has checked that offsets, shapes and the file's size agree."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    start = 8 + size
    return {
        key: _Entry(
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            start + entry["data_offsets"][1],
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _shards(index: Path) -> list[str]:
    """The file names of a sharded base, each once."""
    try:
        names = read_json(index)["weight_map"].values()
        files = sorted(set(names))
        plain = all(
            name == Path(name).name
            and name.endswith(".safetensors")
            and "\0" not in name
            and len(os.fsencode(name)) <= 255  # what file systems take
            for name in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index: {error!r}") from None
    if not files or not plain:
        raise CheckpointError(
            f"{index}: weight_map: expected names of .safetensors files beside it"
        )
    return files


def _check_fit(adapter: Adapter, base: Mapping[str, _Entry]) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}.weight".lstrip("."): (layer.lora_b.shape[0], layer.lora_a.shape[1])
        for path, layer in adapter.layers.items()
    }
    shapes |= {name: tuple(value.shape) for name, value in adapter.others.items()}
    for layer in adapter.layers.values():
        _ = layer.scaling  # raises where alpha is unknown
    problems = []
    for key, shape in shapes.items():
        if key not in base:
            problems.append(f"no {key}{nearest(key, base)}")
        elif base[key].shape != shape:
            problems.append(f"{key}: expected shape {shape}, got {base[key].shape}")
        elif base[key].dtype not in _FLOATS:
            kinds = ", ".join(_FLOATS)
            problems.append(f"{key}: expected one of {kinds}, got {base[key].dtype}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            "the base does not fit the adapter: " + "; ".join(problems[:3]) + more
        )


def _merge_into(file: Path, adapter: Adapter) -> list[MergedLayer]:
    """Overwrite the adapted weights of a base file in its place, and the heads. Sizes do not change, so neither does the rest."""
    header = _header(file)
    merged = []
    with file.open("r+b") as opened:
        for path, layer in adapter.layers.items():
            entry = header.get(f"{path}.weight".lstrip("."))
            if entry is None:
                continue  # in another shard
            dtype = _FLOATS[entry.dtype]
            opened.seek(entry.begin)
            raw = bytearray(opened.read(entry.end - entry.begin))
            weight = torch.frombuffer(raw, dtype=dtype).view(entry.shape)
            wide = torch.promote_types(
                torch.promote_types(dtype, layer.lora_a.dtype), torch.float32
            )
            exact = torch.addmm(
                weight.to(wide), layer.lora_b.to(wide), layer.lora_a.to(wide), alpha=layer.scaling
            )
            rounded = exact.to(dtype)
            opened.seek(entry.begin)
            opened.write(_bytes(rounded))
            change = abs(layer.scaling) * update_norm(layer)
            off = float(torch.linalg.vector_norm(rounded.to(wide) - exact, dtype=torch.float64))
            merged.append(MergedLayer(path, dtype, off / change if change else 0.0))
        for name, value in adapter.others.items():
            if name in header:
                opened.seek(header[name].begin)
                opened.write(_bytes(value.to(_FLOATS[header[name].dtype])))
    return merged


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
