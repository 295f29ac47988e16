"""Safetensors files of kohya's sd-scripts and files of torchtune ↔ `AdapterState`.

kohya: `lora_unet_<path with underscores>.lora_down.weight` (R, K), `.lora_up.weight` (N, R), `.alpha` (a scalar); a matrix that the
model computes as a convolution of size 1 has two more dimensions. torchtune: `<path>.lora_a.weight`, `<path>.lora_b.weight`, under DoRA
`<path>.magnitude`; alpha is in the adapter_config.json beside it. Paths in torchtune's files are those of torchtune's own models.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import CheckpointError, FastLoRAWarning, first_few
from fastlora.files import read_json_object
from fastlora.io.adapter_state import AdapterState, LayerState
from fastlora.io.kohya_names import is_kohya, kohya_names, resolve
from fastlora.io.safetensors_format import group_tensors, layer_states, safetensors_bytes

_KOHYA = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}
_TORCHTUNE = {"lora_a.weight": "lora_A", "lora_b.weight": "lora_B", "magnitude": "lora_magnitude"}
_TORCHTUNE_CONFIG = "adapter_config.json"


class Given(NamedTuple):
    """What a command was told about a file.

    alpha: of the layers for which the file stores none. prefer_own: ignore it if there are none, instead of refusing it.
    bases: component → paths of a base model's layers, by which names with underscores are resolved; the component "" is any.
    """

    alpha: float | None = None
    prefer_own: bool = False
    bases: Mapping[str, set[str]] = {}


def read_kohya(file: Path, tensors: Mapping[str, Tensor], given: Given) -> AdapterState:
    """The adapter in kohya's file; its paths begin with the component of the pipeline (`unet.`, `text_encoder.`).

    A layer without alpha has the rank as alpha, as in sd-scripts. Warns of that, and of names that stay as they are since no table knows
    their modules.

    Raises: CheckpointError if the tensors do not fit together, or a name is not in the base or may mean two layers of it.
    """
    factors: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, ending = key.partition(".")
        if not is_kohya(key) or ending not in (*_KOHYA, "alpha"):
            raise CheckpointError(
                f"{file}: {key}: expected names as lora_unet_… with {', '.join(_KOHYA)} or alpha"
            )
        (alphas if ending == "alpha" else factors)[key] = tensor
    layers, _ = group_tensors(file, factors, _KOHYA)
    stored = scalars(file, {key.removesuffix(".alpha"): value for key, value in alphas.items()})
    try:
        paths, unknown = resolve(layers, given.bases)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if unknown:
        warnings.warn(
            f"{file}: {first_few(unknown)}: which underscores stand for dots is unknown, so the names stay as they are; pass the base model "
            "with --base",
            FastLoRAWarning,
            stacklevel=2,
        )
    found = {paths[name]: layer for name, layer in layers.items()}
    stray = stored.keys() - layers.keys()
    if stray:
        raise CheckpointError(f"{file}: {min(stray)} has alpha without lora_down and lora_up")
    known = {paths[name]: alpha for name, alpha in stored.items()}
    return AdapterState(states_with_alphas(file, found, known, given), {}, "kohya")


def scalars(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of tensors of one element. Raises: CheckpointError naming one that is not."""
    for name, tensor in tensors.items():
        if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
            raise CheckpointError(
                f"{file}: {name}.alpha: expected one number, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    return {name: float(tensor) for name, tensor in tensors.items()}


def states_with_alphas(
    file: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    stored: Mapping[str, float],
    given: Given,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, LayerState]:
    """The layers with the alpha that the file stores, else the given one, else their rank, with a warning.

    A convolution is taken to have no dilation and zeros as padding, as all have in the models that such files are made for.
    settings: the other settings of a layer, by path.

    Raises: CheckpointError if an alpha was given and the file stores all, or if a layer's tensors do not fit together.
    """
    lacking = [path for path in layers if path not in stored]
    if given.alpha is not None and not lacking and not given.prefer_own:
        raise CheckpointError(f"--alpha: {file} already stores alpha")
    if lacking and given.alpha is None:
        warnings.warn(
            f"{file}: stores no alpha for {first_few(lacking)}; taken for the rank, so the scaling is 1",
            FastLoRAWarning,
            stacklevel=3,
        )
    described = {}
    for path, found in layers.items():
        a = found["lora_A"]
        default = given.alpha if given.alpha is not None else float(max(a.shape[:1], default=1))
        described[path] = {"alpha": stored.get(path, default)} | dict(
            (settings or {}).get(path, {})
        )
        if a.ndim > 2:
            described[path] |= {"dilation": [1] * (a.ndim - 2), "padding_mode": "zeros"}
    return layer_states(file, layers, described)


def kohya_bytes(state: AdapterState) -> bytes:
    """kohya's file of a folded state whose paths begin with a component.

    Raises: CheckpointError naming what the format cannot store.
    """
    refuse_for_diffusion(state, "kohya's files", dora=False)
    tensors = {}
    for path, name in kohya_names(state.layers).items():
        layer = state.layers[path]
        tensors[f"{name}.lora_down.weight"] = layer.lora_a
        tensors[f"{name}.lora_up.weight"] = layer.lora_b
        tensors[f"{name}.alpha"] = torch.tensor(layer.scaling * layer.rank)
    return safetensors_bytes(tensors, {"format": "pt"})


def refuse_for_diffusion(state: AdapterState, what: str, *, dora: bool) -> None:
    """Raises: CheckpointError naming a layer or head that files of diffusion models do not hold. dora: whether they hold magnitudes."""
    if state.others:
        raise CheckpointError(f"{min(state.others)}: {what} hold no tensors besides adapters")
    for path, layer in state.layers.items():
        reason = None
        if layer.kind in ("embedding", "transposed"):
            reason = f"hold no adapter of kind {layer.kind!r}"
        elif layer.use_dora and not dora:
            reason = "have no DoRA as fastlora's"
        elif layer.kind == "conv" and layer.groups != 1:
            reason = "hold no adapter of a convolution with groups"
        elif layer.kind == "conv" and (
            layer.padding_mode != "zeros" or any(d != 1 for d in layer.dilation or [0])
        ):
            reason = (
                "hold no adapter of a convolution with dilation or a padding mode, or without those"
            )
        if reason is not None:
            raise CheckpointError(f"{path or 'the layer'}: {what} {reason}")


def read_torchtune(file: Path, tensors: Mapping[str, Tensor], given: Given) -> AdapterState:
    """The adapter in torchtune's file, under the paths of torchtune's model. Its other tensors are heads.

    alpha: of adapter_config.json beside the file, which torchtune writes; else the given one; else unknown.

    Raises: CheckpointError if the tensors do not fit together, if the config has another rank, or if it stores alpha and one was given.
    """
    layers, others = group_tensors(file, tensors, _TORCHTUNE)
    config = file.parent / _TORCHTUNE_CONFIG
    alpha: Any = given.alpha
    if config.is_file():
        stored = read_json_object(config)
        if given.alpha is not None and not given.prefer_own and "lora_alpha" in stored:
            raise CheckpointError(f"--alpha: {config} already stores alpha")
        alpha = stored.get("lora_alpha", alpha)
        ranks = {path: found["lora_A"].shape[:1] for path, found in layers.items()}
        for path, rank in ranks.items():
            if "r" in stored and (stored["r"],) != tuple(rank):
                raise CheckpointError(
                    f"{config}: r is {stored['r']!r}, but {path} has rank {min(rank, default=0)}"
                )
    known = None if alpha is None else {"alpha": alpha}
    states = layer_states(file, layers, dict.fromkeys(layers, known))
    return AdapterState(states, others, "torchtune")
