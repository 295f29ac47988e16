"""Merging an adapter into files of base weights, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastlora.cli.base_files import Entry, find_base, read_header
from fastlora.cli.convert import refuse_existing
from fastlora.errors import CheckpointError, FastLoRAWarning, MergeError, first_few, nearest
from fastlora.files import move_into_place, replaced_folder
from fastlora.io.adapter_state import BANKS, AdapterState, LayerState

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_DTYPES = _FLOATS | {"I64": torch.int64}  # of heads: BatchNorm counts its batches
_OTHER_ORIENTATION = {"linear": "transposed", "experts": "transposed_experts"}
_OTHER_ORIENTATION |= {other: kind for kind, other in _OTHER_ORIENTATION.items()}


class MergedLayer(NamedTuple):
    """The result of merging one layer: its path, the weight's dtype, and the share ‖rounding‖ / ‖ΔW‖ that rounding lost."""

    path: str
    dtype: torch.dtype
    lost: float


def merge_files(
    base: Path, adapter: AdapterState, target: Path, *, force: bool
) -> list[MergedLayer]:
    """Write a copy of the `base` weights with the adapter merged, one layer in memory at a time.

    W + ΔW is summed in float32 or wider and rounded once to the dtype of W. Heads saved with the adapter replace those of the
    base. A layer or head that its model has under several names is written under all that the base has. Everything else, metadata
    included, is copied byte by byte. Whether a matrix is stored transposed is determined by its shape in the base, and by the adapter
    only if it is square. If no key fits, one leading name is removed from or added to the adapter's keys, with a warning: transformers
    saves some models without it.

    base: a safetensors file; or the `*.index.json` of a sharded one, or a folder as transformers writes it (`find_base`): then
        `target` is a folder.
    force: replace an existing target. A folder is replaced as a whole, and only if it holds nothing but files that are written.

    Without a config.json, warns if a weight that changes has the values of one that does not, as in a model that ties them.

    A killed merge leaves the target as it was, complete or missing, never mixed.

    Raises: CheckpointError if a layer or head is not in the base or does not fit, with the nearest key; if a weight is not
    a float of 16 to 64 bits; if a weight is square and the shapes of other layers contradict the adapter; if the adapter's file or
    config.json ties a weight to another; if the target is or holds a file of the base, which a second merge would merge again; or if
    the target exists without `force`. MergeError, naming the layer or head, if what would be written is not finite where the base is.
    Nothing is written then.
    """
    files = find_base(base)
    for file in files.weights:
        if not file.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{file}: not a readable safetensors file: no such file")
    target = target.absolute()
    sources = [*files.weights, *files.copied]
    _check_target(target, sources, files.is_folder, force)
    entries = {key: e for file in files.weights for key, e in read_header(file).items()}
    named = _with_prefix_of(entries, adapter)
    _refuse_tied(named, entries, files.config)
    state = _fit(_at_all_places(named, entries), entries)
    if not files.config:
        _warn_of_equal_weights(state, files.weights)
    try:
        if files.is_folder:
            with replaced_folder(target) as new:
                return _write_merged(sources, files.weights, new, state)
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=target.parent) as temporary:
            merged = _write_merged(sources, files.weights, Path(temporary), state)
            move_into_place({Path(temporary) / base.name: target})
            return merged
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def _check_target(target: Path, sources: Iterable[Path], is_folder: bool, force: bool) -> None:
    """Raises: CheckpointError if writing `target` would change a file of the base or remove a file that is not written again."""
    if target.exists() and target.is_dir() != is_folder:
        problem = "file; this base needs a folder" if is_folder else "folder; expected a file"
        raise CheckpointError(f"{target}: is a {problem} to write to")
    real = Path(os.path.realpath(target))  # Path.resolve may refuse a circle of links
    for source in sources:
        named = source.parent.resolve() / source.name  # a link, as in the cache of transformers
        held = {source.resolve(), *source.resolve().parents, named, *named.parents}
        if real in held or (target.is_file() and source.exists() and target.samefile(source)):
            raise CheckpointError(
                f"{target}: is or holds the base's {source.name}; the next merge would merge the adapter again, "
                "so write to another path"
            )
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: no such folder: {target.parent}")
    if not is_folder:
        return refuse_existing([target], force)
    present = {path.name for path in target.iterdir()} if target.exists() else set()
    foreign = present - {source.name for source in sources}
    if foreign:
        raise CheckpointError(
            f"{target}: holds {min(foreign)}, which a merge does not write and would remove"
        )
    refuse_existing([target] if present else [], force)


def _write_merged(
    sources: Iterable[Path], weights: Iterable[Path], folder: Path, state: AdapterState
) -> list[MergedLayer]:
    """Copy the files of the base to `folder` and merge into the copies of the weights."""
    merged = []
    for source in sources:
        copied = folder / source.name
        shutil.copyfile(source, copied)
        if source in weights:
            merged += _merge_into(copied, state)
    return merged


def _with_prefix_of(base: Mapping[str, Entry], state: AdapterState) -> AdapterState:
    """`state` with the names of the base, and with one leading name removed from or added to them, if only so every layer is in the base."""
    others = {state.base_name(n): head for n, head in state.others.items()}
    ties = state.ties and {state.base_name(n): state.base_name(t) for n, t in state.ties.items()}
    state = replace(state, others=others, ties=ties)
    if any(_weight(path, layer) in base for path, layer in state.layers.items()):
        return state
    own = next(iter(state.layers)).partition(".")[0] + "."
    changes = [(own, ""), *(("", f"{n}.") for n in sorted({k.partition(".")[0] for k in base}))]
    for old, new in changes:
        layers = {
            new + path.removeprefix(old): replace(
                layer, shared_with=[new + p.removeprefix(old) for p in layer.shared_with]
            )
            for path, layer in state.layers.items()
        }
        if len(layers) == len(state.layers) and all(
            _weight(*item) in base for item in layers.items()
        ):
            renamed = {name: new + name.removeprefix(old) for name in state.others}
            names = {n: renamed[n] if renamed[n] in base else n for n in state.others}
            others = {names[n]: head for n, head in state.others.items()}
            change = f"without {old!r}" if old else f"with {new!r} in front"
            warnings.warn(
                f"the keys of the adapter fit the base {change}", FastLoRAWarning, stacklevel=3
            )
            ties = state.ties and {names[n]: names[tie] for n, tie in state.ties.items()}
            return replace(state, layers=layers, others=others, ties=ties)
    return state


def _at_all_places(state: AdapterState, base: Mapping[str, Entry]) -> AdapterState:
    """`state` with each shared layer, and each tied head, under those of its names that the base has, or under one if it has none."""
    layers: dict[str, LayerState] = {}
    for path, layer in state.layers.items():
        present = [p for p in (path, *layer.shared_with) if _weight(p, layer) in base]
        layers |= dict.fromkeys(present or [path], layer)
    twins = _twins(state)
    absent = [
        name
        for name in state.others
        if name not in base and any(twin in base for twin in twins[name])
    ]
    if absent and state.ties is None:
        warnings.warn(
            f"{first_few(absent)}: not in the base, and equal to other heads that are: taken for tied to them",
            FastLoRAWarning,
            stacklevel=3,
        )
    others = {name: head for name, head in state.others.items() if name not in absent}
    return replace(state, layers=layers, others=others)


def _twins(state: AdapterState) -> dict[str, list[str]]:
    """Name → the names of the other heads that are the same tensor: as the file tells, or those with equal values if it does not."""
    groups: dict[Any, list[str]] = {}
    for name, head in state.others.items():
        if state.ties is not None:
            groups.setdefault(state.ties.get(name, name), []).append(name)
            continue
        data = head.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        key = (head.shape, head.dtype, hashlib.sha256(data).digest())
        groups.setdefault(key, []).append(name)
    return {name: [n for n in group if n != name] for group in groups.values() for name in group}


def _refuse_tied(state: AdapterState, base: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError if a changed weight is tied to one that does not change with it, according to the adapter's file, or to
    config.json for one with a row for each token.
    """
    text = config.get("text_config")
    configs = [config, text] if isinstance(text, dict) else [config]
    ties = [c.get("tie_word_embeddings") for c in configs]
    untied = any(t is False for t in ties) and not any(t is True for t in ties)
    sizes = {c["vocab_size"] for c in configs if isinstance(c.get("vocab_size"), int)}
    words = {key for key, e in base.items() if len(e.shape) == 2 and e.shape[0] in sizes}
    adapted = {_weight(p, layer): layer for p, layer in state.layers.items()}
    changed = {key for key, layer in adapted.items() if layer.tied_to and not untied}
    # An older config.json leaves a default out; a single matrix then is the one that is tied.
    if any(t is True for t in ties) or (not untied and len(words) == 1):
        alone = (name for name, twins in _twins(state).items() if not twins)
        changed |= words & {*adapted, *alone}
    if changed:
        key = min(changed)
        others = adapted[key].tied_to if key in adapted else ()
        raise CheckpointError(
            f"{key}: is tied to {others[0] if others else 'another weight of the model (tie_word_embeddings)'}, which the merge "
            "would change too; untie them and save both"
        )


def _warn_of_equal_weights(state: AdapterState, files: Iterable[Path]) -> None:
    """Warn if a weight that changes has the values of one that does not: in a model that ties them, one of them would be lost."""
    changed = {*starmap(_weight, state.layers.items()), *state.others}
    alike: dict[Any, list[tuple[str, Path, Entry]]] = {}  # by shape, dtype and first bytes
    for file in files:
        for key, entry in read_header(file).items():
            if len(entry.shape) == 2:
                start = _read(file, entry, 4096)
                if len(set(start)) > 1:  # else zeros, equal by chance
                    place = (key, file, entry)
                    alike.setdefault((entry.shape, entry.dtype, start), []).append(place)
    pairs = []
    for group in alike.values():
        mine = [place for place in group if place[0] in changed]
        others = [place for place in group if place[0] not in changed]
        if not (mine and others):
            continue
        digests = {key: _digest(file, entry) for key, file, entry in group}
        pairs += [
            f"{key} = {other}"
            for key, *_ in mine
            for other, *_ in others
            if digests[key] == digests[other]
        ]
    if pairs:
        warnings.warn(
            f"these weights are equal in the base, and only one of them changes: {first_few(pairs)}; if the model ties them, the "
            "merged file does not hold what it computes with the adapter",
            FastLoRAWarning,
            stacklevel=3,
        )


def _read(file: Path, entry: Entry, size: int | None = None) -> bytes:
    """The first bytes of a tensor; all of them for None."""
    with file.open("rb") as opened:
        opened.seek(entry.begin)
        whole = entry.end - entry.begin
        return opened.read(whole if size is None else min(size, whole))


def _digest(file: Path, entry: Entry) -> bytes:
    return hashlib.sha256(_read(file, entry)).digest()


def _fit(state: AdapterState, base: Mapping[str, Entry]) -> AdapterState:
    """`state` with the kind of each matrix, "linear" or "transposed", taken from its shape in the base.

    Raises: CheckpointError naming the tensors that are missing from the base, wrongly shaped or not of a float dtype; a scaling
    that is unknown or too large; or a square weight, if the shape of another layer contradicts the adapter's file.
    """
    reoriented, square = {}, []
    for path, layer in state.layers.items():
        if abs(layer.scaling) > torch.finfo(torch.float32).max:
            raise CheckpointError(f"{path}: the scaling {layer.scaling:g} is too large for float32")
        if layer.kind in _OTHER_ORIENTATION:
            entry, shape = base.get(_weight(path, layer)), layer.weight_shape
            turned = (*shape[:-2], shape[-1], shape[-2])
            if shape == turned:
                square.append(path)
            elif entry is not None and entry.shape == turned:
                reoriented[path] = replace(layer, kind=_OTHER_ORIENTATION[layer.kind])
    for path in square:
        bank = state.layers[path].kind in BANKS
        alike = [p for p, layer in state.layers.items() if (layer.kind in BANKS) == bank]
        turned_too = next((p for p in alike if p in reoriented), None)
        unknown = f"{path}: whether this square weight is stored transposed is unknown, since"
        advice = "merge in Python (merged_model)"
        if turned_too is not None:
            raise CheckpointError(
                f"{unknown} {turned_too} is not stored as the adapter's file states; {advice}"
            )
        if bank and state.format == "peft" and set(alike) <= set(square):
            raise CheckpointError(f"{unknown} PEFT's folders do not store it; {advice}")
    layers = state.layers | reoriented
    shapes = {_weight(path, layer): layer.weight_shape for path, layer in layers.items()}
    shapes |= {name: tuple(value.shape) for name, value in state.others.items()}
    problems = []
    for key, shape in shapes.items():
        if key not in base:
            problems.append(f"no {key}{nearest(key, base)}")
        elif base[key].shape != shape:
            problems.append(f"{key}: expected shape {shape}, got {base[key].shape}")
        elif base[key].dtype not in (allowed := _DTYPES if key in state.others else _FLOATS):
            problems.append(f"{key}: expected one of {', '.join(allowed)}, got {base[key].dtype}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            "the base does not fit the adapter: " + "; ".join(problems[:3]) + more
        )
    return replace(state, layers=layers)


def _merge_into(file: Path, state: AdapterState) -> list[MergedLayer]:
    """Overwrite the adapted weights and the heads in a base file, in place: sizes do not change, so neither do the offsets."""
    header = read_header(file)
    merged = []
    with file.open("r+b") as opened:
        # Heads first: PEFT may save the weight of an adapted layer too.
        for name in state.others.keys() & header.keys():
            entry, head = header[name], state.others[name]
            if not head.to(_DTYPES[entry.dtype]).isfinite().all():
                raise MergeError(
                    f"{name}: the adapter's values are not all finite in {entry.dtype}"
                )
            _write(opened, entry, head)
        for path, layer in state.layers.items():
            key = _weight(path, layer)
            if key not in header:
                continue  # in another shard
            entry = header[key]
            dtype = _FLOATS[entry.dtype]
            opened.seek(entry.begin)
            data = bytearray(opened.read(entry.end - entry.begin))
            base = torch.frombuffer(data, dtype=dtype).view(entry.shape)
            try:
                weight, lost = layer.merge(base)
            except MergeError as error:
                raise MergeError(f"{path or 'the layer'}: {error}") from None
            spoiled = int((~base.isfinite()).sum())
            if spoiled:
                warnings.warn(
                    f"{key}: {spoiled} values of the base are not finite, and stay so",
                    FastLoRAWarning,
                    stacklevel=3,
                )
            _write(opened, entry, weight)
            merged.append(MergedLayer(path, dtype, lost))
    return merged


def _weight(path: str, layer: LayerState) -> str:
    """The key of the weight of the layer at `path`; a bank of experts is a parameter itself."""
    return path if layer.kind in BANKS else f"{path}.weight".lstrip(".")


def _write(file: BinaryIO, entry: Entry, tensor: Tensor) -> None:
    """Overwrite the bytes of `entry`."""
    flat = tensor.to(_DTYPES[entry.dtype]).contiguous().reshape(-1)
    file.seek(entry.begin)
    file.write(flat.view(torch.uint8).numpy().tobytes())
