"""Adapter files without a model: read any format, write another, compare updates.

Formats: "fastlora" (one safetensors file with alpha and the other settings in its metadata), "peft" (a folder), "loralib" (one
safetensors file with the same keys and no settings), "diffusers" and "kohya" (one safetensors file for the models of a pipeline), and
"torchtune" (which is only read). Files of torch.save are read without running code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora.cli.base_files import layers_of_base
from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.files import read_json_object, write_files
from fastlora.io.adapter_state import BANKS, AdapterState, LayerState
from fastlora.io.foreign_formats import Given, kohya_bytes, read_kohya, read_torchtune
from fastlora.io.kohya_names import COMPONENTS
from fastlora.io.recognise import format_of, read_contents, refuse_type
from fastlora.io.safetensors_format import adapter_of, fastlora_bytes, safetensors_bytes
from fastlora.peft.config import CONFIG_FILE, WEIGHTS_FILE
from fastlora.peft.diffusers_format import diffusers_bytes, read_diffusers
from fastlora.peft.folder_format import heads_of, peft_config, read_folder, write_folder

FORMATS = ("fastlora", "peft", "loralib", "diffusers", "kohya")
READ_FORMATS = (*FORMATS, "torchtune")
PIPELINE_FORMATS = ("diffusers", "kohya")
_ONE_FILE = ("fastlora", "loralib")  # in one file, told apart by its metadata


def read_adapter(
    source: Path,
    alpha: float | None = None,
    *,
    prefer_own: bool = False,
    format: str | None = None,
    base: Path | None = None,
) -> AdapterState:
    """Read an adapter's file, or a folder in PEFT's format.

    alpha: for a file that does not store it. prefer_own: ignore `alpha` for a file that does.
    format: one of `READ_FORMATS`; None recognises it. base: a base model, whose keys resolve the names in kohya's files.

    Raises: CheckpointError if the source is not an adapter, is damaged, or is of another format than `format`; if it stores alpha and one
    is passed, or if alpha is invalid.
    """
    if source.name == WEIGHTS_FILE and (source.parent / CONFIG_FILE).is_file():
        source = source.parent
    if source.is_dir():
        state = _read_folder(source)
    elif not source.is_file():
        raise CheckpointError(f"no such file or folder: {source}")
    else:
        given = Given(alpha, prefer_own)
        state = _read_file(source, format, given, base)
    known = {format} | ({"fastlora", "loralib"} if format in _ONE_FILE else set())
    if format is not None and state.format not in known:
        raise CheckpointError(f"--from: {source} is in the format {state.format}, not {format}")
    own = state.format in ("fastlora", "peft")
    if alpha is not None and own and not prefer_own:
        raise CheckpointError(f"--alpha: {source} already stores alpha")
    return state


def _read_folder(folder: Path) -> AdapterState:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if config.is_file():
        fields = read_json_object(config)
        if fields.get("peft_type") != "LORA" and weights.is_file():
            refuse_type(folder, fields, read_contents(weights).tensors)
        refuse_type(folder, fields, ())
    return read_folder(folder)


def _read_file(file: Path, format: str | None, given: Given, base: Path | None) -> AdapterState:
    contents = read_contents(file)
    format = format or format_of(file, contents)
    if format == "kohya":
        bases = {} if base is None else layers_of_base(base)
        return read_kohya(file, contents.tensors, given._replace(bases=bases))
    if format == "torchtune":
        return read_torchtune(file, contents.tensors, given)
    if format == "diffusers":
        return read_diffusers(file, contents.tensors, contents.metadata, given)
    return adapter_of(file, contents, given.alpha)


def of_one_model(state: AdapterState, component: str | None) -> AdapterState:
    """The part of a pipeline's adapter that belongs to one model, under the model's own paths; other states as they are.

    component: which, as "unet"; None if the file holds one only.

    Raises: CheckpointError if the file holds several and none is named, or not the named one.
    """
    if state.format not in PIPELINE_FORMATS:
        if component is not None:
            raise CheckpointError(
                f"--component: the adapter is of one model, in the format {state.format}"
            )
        return state
    held = components(state)
    if component is None:
        if len(held) > 1:
            raise CheckpointError(
                f"--component: the file holds adapters of {', '.join(held)}; name one"
            )
        component = held[0]
    if component not in held:
        raise CheckpointError(
            f"--component: expected one of {', '.join(held)}, got {component}"
            if any(held)
            else f"--component: the file names no model of a pipeline, got {component}"
        )
    return _part(state, component, "")


def components(state: AdapterState) -> list[str]:
    """The models that a pipeline's adapter belongs to; "" for layers whose paths begin with none."""
    heads = (path.partition(".")[0] for path in (*state.layers, *state.others))
    return sorted({head if head in COMPONENTS else "" for head in heads})


def _part(state: AdapterState, component: str, new: str) -> AdapterState:
    """The layers and heads of a component, under paths that begin with `new`."""
    old = f"{component}." if component else ""

    def inside(path: str) -> bool:
        first = path.partition(".")[0]
        return (first if first in COMPONENTS else "") == component

    layers = {new + p.removeprefix(old): x for p, x in state.layers.items() if inside(p)}
    others = {new + p.removeprefix(old): x for p, x in state.others.items() if inside(p)}
    return replace(state, layers=layers, others=others)


def _for_pipeline(state: AdapterState, component: str | None) -> AdapterState:
    """The state under paths that begin with a model of a pipeline: with that of the file, or with `component` if it has none."""
    if component is not None and component not in COMPONENTS:
        raise CheckpointError(
            f"--component: expected one of {', '.join(COMPONENTS)}, got {component}"
        )
    prefix = "" if component is None else f"{component}."
    if state.format not in PIPELINE_FORMATS:
        layers = {prefix + path: layer for path, layer in state.layers.items()}
        others = {prefix + name: head for name, head in state.others.items()}
        return replace(state, layers=layers, others=others)
    held = components(state)
    if component is None:
        return state
    if component not in held and held != [""]:
        raise CheckpointError(f"--component: expected one of {', '.join(held)}, got {component}")
    return _part(state, component if component in held else "", prefix)


def convert(
    state: AdapterState,
    target: Path,
    format: str,
    *,
    force: bool,
    alpha: float | None,
    component: str | None = None,
) -> AdapterState:
    """Write `state` to `target` (a folder for "peft", else a file) in another format, and return what was written.

    The initial product that PiSSA and OLoRA subtract is kept in fastlora's format; in the others it becomes part of the factors,
    whose rank doubles.

    force: replace an existing target. alpha: only for "loralib", whose files do not store it: the `lora_alpha` with which
    the loralib model is built. It must be the alpha of every layer.
    component: the model of a pipeline, as "unet". Of a pipeline's file, only its layers are written, in the formats of one model
        under its own paths; of another file, all layers are written with this name in front.

    Warns if a tensor is not finite.

    Raises: CheckpointError naming what the format cannot store, if alpha is unknown, or if the target exists or cannot be
    written. Nothing is written then.
    """
    if format in PIPELINE_FORMATS:
        state = _for_pipeline(state, component)
    else:
        state = of_one_model(state, component)
    for layer in state.layers.values():
        _ = layer.scaling  # raises if alpha is unknown
    spoiled = [name for name, tensor in state.tensors().items() if not tensor.isfinite().all()]
    if spoiled:
        warnings.warn(
            f"{len(spoiled)} tensors have values that are not finite, and are converted as they are: {spoiled[0]}",
            FastLoRAWarning,
            stacklevel=2,
        )
    if format == "peft":
        _write_peft(state, target, force)
        return state
    if target.is_dir():
        raise CheckpointError(f"{target}: is a folder; expected the name of a file to write")
    if format == "fastlora":
        data = fastlora_bytes(state)
    elif format == "loralib":
        data = _loralib_bytes(state.folded(), alpha)
    else:
        data = (kohya_bytes if format == "kohya" else diffusers_bytes)(state.folded())
    refuse_existing([target], force)
    write_files({target: data})
    return state


def _write_peft(state: AdapterState, folder: Path, force: bool) -> None:
    folded = state.folded()
    outside = [
        name
        for name in state.others
        if not (name.endswith(".weight") and state.base_name(name) != name)
    ]
    heads = heads_of(outside, state.layers)
    if state.partial is not None:
        raise CheckpointError(
            f"{state.partial} is not in the file, but belongs to a module of which a part trained, and PEFT's format holds such "
            "modules in full; save_pretrained writes it from the model"
        )
    config = peft_config(folded, heads)
    refuse_existing([folder / WEIGHTS_FILE, folder / CONFIG_FILE], force)
    write_folder(folder, folded, config)


def update_norm(layer: LayerState) -> float:
    """‖B A − B₀ A₀‖, the Frobenius norm, in float64 without forming the product."""
    return _product_norm(*_by_groups(layer))


def difference_norm(one: LayerState, other: LayerState) -> float:
    """The norm of the difference of two updates, each with its scaling; DoRA's magnitudes are ignored.

    Raises: CheckpointError if the layers' sizes differ or an alpha is unknown.
    """
    (b1, a1), (b2, a2) = _by_groups(one), _by_groups(other)
    inside = 2 if one.kind in BANKS else 1  # after the dimensions of the rank and before
    if b1.shape[:2] != b2.shape[:2] or one.lora_a.shape[inside:] != other.lora_a.shape[inside:]:
        raise CheckpointError("the layers have different sizes")
    return _product_norm(
        torch.cat([one.scaling * b1, -other.scaling * b2], 2), torch.cat([a1, a2], 1)
    )


def _by_groups(layer: LayerState) -> tuple[Tensor, Tensor]:
    """The folded B as (groups, N / groups, R / groups) and A as (groups, R / groups, K), in float64; a group is an expert of a bank."""
    layer = layer.folded()
    if layer.kind in BANKS:
        return layer.lora_b.double(), layer.lora_a.double()
    a, b = layer.lora_a.double().flatten(1), layer.lora_b.double().flatten(1)
    return b.reshape(layer.groups, -1, b.shape[1]), a.reshape(layer.groups, -1, a.shape[1])


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖ over all groups, from the R factors of QR: small differences of large updates keep their precision."""
    r1, r2 = torch.linalg.qr(left, "r").R, torch.linalg.qr(right.mT, "r").R
    return float(torch.linalg.vector_norm(r1 @ r2.mT))


def _loralib_bytes(state: AdapterState, alpha: float | None) -> bytes:
    """loralib's file, which has only tensors: the settings must be those with which the loralib model is built."""
    for path, layer in state.layers.items():
        if layer.kind == "conv" or layer.use_dora:
            what = "no DoRA" if layer.use_dora else "different factors for convolutions"
            raise CheckpointError(f"{path}: loralib has {what}")
    values = sorted({layer.scaling * layer.rank for layer in state.layers.values()})
    if len(values) > 1:
        raise CheckpointError(
            f"alpha: the layers have {len(values)} different values ({values[0]:g} to {values[-1]:g}), "
            "and loralib's files store none"
        )
    if alpha is None or not math.isclose(alpha, values[0], rel_tol=1e-6):
        given = "" if alpha is None else f", not {alpha:g}"
        raise CheckpointError(
            f"alpha: loralib's files do not store it; build the loralib model with "
            f"lora_alpha={values[0]:g}{given}, and confirm it with --alpha {values[0]:g}"
        )
    return safetensors_bytes(state.tensors(), {"format": "pt"})


def refuse_existing(targets: Iterable[Path], force: bool) -> None:
    for target in targets:
        if target.exists() and not force:
            raise CheckpointError(f"{target}: exists; --force replaces it")
