"""Adapter files without a model: read any format, write another, compare updates.

Formats: "fastlora" (one safetensors file with alpha and the other settings in its metadata), "peft" (a folder), and "loralib" (one
safetensors file with the same keys and no settings). Pickles are not read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.files import write_files
from fastlora.io.adapter_state import AdapterState, LayerState
from fastlora.io.safetensors_format import fastlora_bytes, read_adapter_file, safetensors_bytes
from fastlora.peft.config import CONFIG_FILE, WEIGHTS_FILE
from fastlora.peft.folder_format import heads_of, peft_config, read_folder, write_folder

FORMATS = ("fastlora", "peft", "loralib")


def read_adapter(
    source: Path, alpha: float | None = None, *, prefer_own: bool = False
) -> AdapterState:
    """Read a safetensors file, or a folder in PEFT's format.

    alpha: for a file that does not store it. prefer_own: ignore `alpha` for a file that does.

    Raises: CheckpointError if the source is not an adapter or is damaged, if it stores alpha and one is passed, or if alpha is invalid.
    """
    if source.name == WEIGHTS_FILE and (source.parent / CONFIG_FILE).is_file():
        source = source.parent
    if source.is_dir():
        state = read_folder(source)
    elif not source.is_file():
        raise CheckpointError(f"no such file or folder: {source}")
    elif source.suffix != ".safetensors":
        raise CheckpointError(
            f"{source}: expected a .safetensors file or a folder in PEFT's format; pickles (.pt, .bin) are not read: "
            "use fastlora.load_adapter and save_adapter in Python"
        )
    else:
        state = read_adapter_file(source, alpha)
    if alpha is not None and state.format != "loralib" and not prefer_own:
        raise CheckpointError(f"--alpha: {source} already stores alpha")
    return state


def convert(
    state: AdapterState, target: Path, format: str, *, force: bool, alpha: float | None
) -> None:
    """Write `state` to `target` (a folder for "peft", else a file) in another format.

    The initial product that PiSSA and OLoRA subtract is kept in fastlora's format; in the others it becomes part of the factors,
    whose rank doubles.

    force: replace an existing target. alpha: only for "loralib", whose files do not store it: the `lora_alpha` with which
    the loralib model is built. It must be the alpha of every layer.

    Warns if a tensor is not finite.

    Raises: CheckpointError naming what the format cannot store, if alpha is unknown, or if the target exists or cannot be
    written. Nothing is written then.
    """
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
        refuse_existing([target / WEIGHTS_FILE, target / CONFIG_FILE], force)
        write_folder(target, folded, config)
        return
    if target.is_dir():
        raise CheckpointError(f"{target}: is a folder; expected the name of a file to write")
    data = _loralib_bytes(state.folded(), alpha) if format == "loralib" else fastlora_bytes(state)
    refuse_existing([target], force)
    write_files({target: data})


def update_norm(layer: LayerState) -> float:
    """‖B A − B₀ A₀‖, the Frobenius norm, in float64 without forming the product."""
    return _product_norm(*_by_groups(layer))


def difference_norm(one: LayerState, other: LayerState) -> float:
    """The norm of the difference of two updates, each with its scaling; DoRA's magnitudes are ignored.

    Raises: CheckpointError if the layers' sizes differ or an alpha is unknown.
    """
    (b1, a1), (b2, a2) = _by_groups(one), _by_groups(other)
    if b1.shape[:2] != b2.shape[:2] or one.lora_a.shape[1:] != other.lora_a.shape[1:]:
        raise CheckpointError("the layers have different sizes")
    return _product_norm(
        torch.cat([one.scaling * b1, -other.scaling * b2], 2), torch.cat([a1, a2], 1)
    )


def _by_groups(layer: LayerState) -> tuple[Tensor, Tensor]:
    """The folded B as (groups, N / groups, R / groups) and A as (groups, R / groups, K), in float64."""
    layer = layer.folded()
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
