"""Loads parts of SAM 3D Objects from the installed package and its model folder.

The folder holds `pipeline.yaml`, which names a YAML file and a file of weights for each part. The package itself builds any class that
these files name; this module reads them as untrusted data. A part is one of a few known classes, built from plain values; its weights
are read without running code, and every tensor must belong to the model.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlora import files
from fastlora.errors import CheckpointError, ConfigError, FastLoRAError
from fastlora.files import check_tensors

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "ATTN_BACKEND": "sdpa",
    "SPARSE_ATTN_BACKEND": "sdpa",
    "SPARSE_BACKEND": "spconv",
    "LIDRA_SKIP_INIT": "1",
}
"""Environment variables that the package reads when imported, with the values that are set if the user has not set any."""

MAX_RESOLUTION = 128  # of the decoder's voxels: its grid of (4·128)³ cubes takes 9 GB
MAX_NUMBER = 2**16  # of any other integer in a part's YAML

_MODELS = "sam3d_objects.model.backbone.tdfy_dit.models"
_SPARSE = "sam3d_objects.model.backbone.tdfy_dit.modules.sparse"


@dataclass(frozen=True)
class Part:
    """A part of the pipeline.

    name: its prefix in pipeline.yaml. classes, nested: allowed as its class, and inside its arguments. generator: whether the model
    is inside a generator's YAML (`module.generator.backbone`) and training checkpoint, or is all of both files.
    """

    name: str
    classes: tuple[str, ...]
    nested: tuple[str, ...] = ()
    generator: bool = False


PARTS = {
    "decoder": Part(
        "slat_decoder_mesh",
        (
            f"{_MODELS}.structured_latent_vae.decoder_mesh.SLatMeshDecoderTdfyWrapper",
            f"{_MODELS}.structured_latent_vae.decoder_mesh.SLatMeshDecoder",
        ),
    ),
    "slat": Part(
        "slat_generator",
        (
            f"{_MODELS}.structured_latent_flow.SLatFlowModelTdfyWrapper",
            f"{_MODELS}.SLatFlowModelTdfyWrapper",
        ),
        generator=True,
    ),
    "structure": Part(
        "ss_generator",
        (f"{_MODELS}.mot_sparse_structure_flow.SparseStructureFlowTdfyWrapper",),
        (
            f"{_MODELS}.mm_latent.Latent",
            f"{_MODELS}.mm_latent.ShapePositionEmbedder",
            f"{_MODELS}.mm_latent.LearntPositionEmbedder",
            f"{_MODELS}.mm_latent.RandomPositionEmbedder",
        ),
        generator=True,
    ),
}
_GENERATOR_YAML = ("module", "generator", "backbone")
_GENERATOR_KEYS = "_base_models.generator."
_WRAPPERS = ("reverse_fn", "backbone")  # solvers and guidance around the model, without weights
_EMBEDDER = "condition_embedder"  # inside a generator's model; its output is cached instead


def load_part(sam3d_dir: str | Path, part: str) -> nn.Module:
    """A part with its weights, on the CPU, frozen and in eval mode: "decoder", or the flow model of "slat" or "structure".

    sam3d_dir: the folder of pipeline.yaml.

    Raises: ConfigError if the part is unknown, `sam3d_objects` cannot be imported, or a YAML file names another class, holds
        anything but plain values, or cannot be built. CheckpointError if a file is missing, unreadable or outside the folder, or its
        tensors do not fit the model.
    """
    if part not in PARTS:
        raise ConfigError(f"sam3d_parts: expected some of {', '.join(PARTS)}, got {part!r}")
    about = PARTS[part]
    config_path, config = _part_config(sam3d_dir, part)
    weights_path = _part_file(sam3d_dir, f"{about.name}_ckpt_path")
    if about.generator:
        _, arguments, prefix = _flow_model(config, config_path, about)
        arguments = {key: value for key, value in arguments.items() if key != _EMBEDDER}
    else:
        arguments = {k: v for k, v in config.items() if k != "pretrained_ckpt_path"}
        arguments["device"] = "cpu"  # of the model's own constants
    model = _build(arguments, about, about.classes, str(config_path))
    assert isinstance(model, nn.Module)
    state = _read_weights(weights_path, about)
    if about.generator:  # its training checkpoint also holds other parts
        state = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(_GENERATOR_KEYS) and not key.startswith(f"{prefix}{_EMBEDDER}.")
        }
    check_tensors(state, model.state_dict(), str(weights_path))
    if integers := sorted(key for key, value in state.items() if not value.is_floating_point()):
        raise CheckpointError(
            f"sam3d_dir: {weights_path}: expected floating-point tensors, got {integers}"
        )
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def _part_config(sam3d_dir: str | Path, part: str) -> tuple[Path, dict[str, Any]]:
    """The path and the content of a part's YAML."""
    path = _part_file(sam3d_dir, f"{PARTS[part].name}_config_path")
    config = _mapping(path)
    size = config.get("resolution")
    if part == "decoder" and not (
        type(size) is int and 8 <= size <= MAX_RESOLUTION and size % 8 == 0
    ):
        raise ConfigError(
            f"sam3d_dir: {path}: resolution: expected a multiple of 8 up to {MAX_RESOLUTION}, got {size!r}"
        )
    return path, config


@dataclass(frozen=True)
class FlowSettings:
    """The distribution of a generator's training times, and the weights of its errors.

    sigma_min, time_scale: of the flow. time_mean, time_std: of the normal distribution whose logistic the times are.
    loss_weights: factor of each latent's error, by name ("feats" for "slat"), default 1.
    """

    sigma_min: float = 0.0
    time_scale: float = 1000.0
    time_mean: float = 0.0
    time_std: float = 1.0
    loss_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PartSettings:
    """A part's latents and training, as its YAML defines them.

    resolution: of the grid of "decoder" and "slat"; None for "structure". latents: (tokens, channels) of each latent by name, tokens
    None for any number; those on a grid are named "feats". condition_channels: of a generator's embedded condition.
    """

    resolution: int | None
    latents: dict[str, tuple[int | None, int]]
    condition_channels: int | None = None
    flow: FlowSettings = field(default_factory=FlowSettings)


def read_settings(sam3d_dir: str | Path, part: str) -> PartSettings:
    """The settings of "decoder", "slat" or "structure". Raises: as `load_part`, and ConfigError if a value cannot be used."""
    path, config = _part_config(sam3d_dir, part)
    where = f"sam3d_dir: {path}"
    if part == "decoder":
        channels = _whole(config, "latent_channels", where)
        return PartSettings(config["resolution"], {"feats": (None, channels)})
    flow, model, _ = _flow_model(config, path, PARTS[part])
    latents: dict[str, tuple[int | None, int]] = {}
    if part == "slat":
        latents["feats"] = None, _whole(model, "in_channels", where)
    else:
        mapping = model.get("latent_mapping")
        if not isinstance(mapping, dict) or not all(isinstance(v, dict) for v in mapping.values()):
            raise ConfigError(f"{where}: latent_mapping: expected latents by name, got {mapping!r}")
        for name, latent in mapping.items():
            channels = _whole(latent, "in_channels", f"{where}: {name}")
            latents[str(name)] = _tokens(latent.get("pos_embedder")), channels
    given = flow.get("loss_weights", 1.0)
    weights = given if isinstance(given, dict) else dict.fromkeys(latents, given)
    sampler = flow.get("training_time_sampler_fn") or {"_target_": ".lognorm_sampler"}
    named = sampler.get("_target_") if isinstance(sampler, dict) else None
    if not str(named).endswith(".lognorm_sampler"):
        raise ConfigError(
            f"{where}: training_time_sampler_fn: expected lognorm_sampler, got {sampler!r}"
        )
    settings = FlowSettings(
        sigma_min=_number(flow, "sigma_min", 0.0, where),
        time_scale=_number(flow, "time_scale", 1000.0, where),
        time_mean=_number(sampler, "mean", 0.0, where),
        time_std=_number(sampler, "std", 1.0, where),
        loss_weights={name: _number(weights, name, 1.0, where) for name in latents},
    )
    resolution = _whole(model, "resolution", where) if part == "slat" else None
    return PartSettings(resolution, latents, _whole(model, "cond_channels", where), settings)


def latent_scale(sam3d_dir: str | Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel, with which the SLat generator normalises.

    `slat_mean` and `slat_std` of pipeline.yaml; without them the package's own.

    Raises: ConfigError if they are not lists of `channels` numbers, or are missing and the package cannot be imported.
    """
    path = Path(sam3d_dir) / "pipeline.yaml"
    pipeline = _mapping(path)
    mean, std = pipeline.get("slat_mean"), pipeline.get("slat_std")
    if mean is None or std is None:
        package = _import("sam3d_objects.pipeline.inference_utils")
        mean, std = package.SLAT_MEAN.tolist(), package.SLAT_STD.tolist()
    lists = [v for v in (mean, std) if isinstance(v, list) and v and all(map(_is_number, v))]
    if len(lists) < 2 or not len(mean) == len(std) == channels or min(std) <= 0:
        raise ConfigError(
            f"sam3d_dir: {path}: slat_mean, slat_std: expected two lists of {channels} numbers, the second positive, "
            f"got {mean!r} and {std!r}"
        )
    return mean, std


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    if not _is_number(value):
        raise ConfigError(f"{where}: {key}: expected a number, got {value!r}")
    return float(value)


def _whole(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= MAX_NUMBER:
        raise ConfigError(f"{where}: {key}: expected 1 to {MAX_NUMBER}, got {value!r}")
    return value


def _tokens(embedder: Any) -> int | None:
    """The number of tokens of a latent, if the arguments of its position embedder determine it."""
    if not isinstance(embedder, dict):
        return None
    count, size, patch = (embedder.get(k) for k in ("token_len", "resolution", "patch_size"))
    if type(count) is int:
        return count
    if type(size) is int and type(patch) is int and patch > 0:
        return int((size // patch) ** 3)
    return None


def sparse_tensor() -> Any:
    """The package's class `SparseTensor`. Raises: ConfigError as `load_part`."""
    return _import(_SPARSE).SparseTensor


def _import(module: str) -> Any:
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing:
        os.environ.update(missing)
        log.info("set for sam3d_objects: %s", " ".join(f"{k}={v}" for k, v in missing.items()))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"model: 'sam3d' needs the package sam3d_objects and its dependencies ({error}); "
            "docs/sam3d.md describes the installation"
        ) from error


# ------------------------------------------------------------------------------------------- YAML


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = files.read_yaml(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"sam3d_dir: cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"sam3d_dir: {path}: expected a mapping of names, got {type(value).__name__}"
        )
    return value


def _part_file(sam3d_dir: str | Path, key: str) -> Path:
    """The file that pipeline.yaml names, inside its folder."""
    folder = Path(sam3d_dir)
    name = _mapping(folder / "pipeline.yaml").get(key)
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"sam3d_dir: {folder / 'pipeline.yaml'}: expected a path under {key!r}, got {name!r}"
        )
    path = folder / name
    # Symbolic links, such as of a download cache, may lead outside the folder; names in the file may not.
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise CheckpointError(f"sam3d_dir: {key}: expected a path inside {folder}, got {name!r}")
    try:
        if path.is_file():
            return path
    except OSError as error:  # an impossible file name
        raise CheckpointError(f"sam3d_dir: {key}: {error}") from error
    raise CheckpointError(f"sam3d_dir: {key}: no file {path}")


def _flow_model(config: Any, path: Path, about: Part) -> tuple[Any, dict[str, Any], str]:
    """The flow's part of a generator's YAML, the model's part of that, and the prefix of the model's tensors."""
    for step in _GENERATOR_YAML:
        config = config.get(step) if isinstance(config, dict) else None
    flow, prefix = config, _GENERATOR_KEYS
    while isinstance(config, dict) and config.get("_target_") not in about.classes:
        inner = next((name for name in _WRAPPERS if isinstance(config.get(name), dict)), None)
        if inner is None:
            raise ConfigError(
                f"sam3d_dir: {path}: expected one of {', '.join(about.classes)} as _target_, got {config.get('_target_')!r}"
            )
        config, prefix = config[inner], f"{prefix}{inner}."
    if not isinstance(config, dict):
        raise ConfigError(f"sam3d_dir: {path}: expected a model under {'.'.join(_GENERATOR_YAML)}")
    return flow, config, prefix


def _build(value: Any, about: Part, allowed: tuple[str, ...], where: str) -> Any:
    """Builds a YAML value: plain values as they are, and `_target_` out of `allowed`, or of `about.nested` inside its arguments."""
    if isinstance(value, list):
        return [_build(v, about, about.nested, f"{where}: {i}") for i, v in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"sam3d_dir: {where}: references are not resolved, got {value!r}")
    if isinstance(value, int) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ConfigError(
            f"sam3d_dir: {where}: expected a number within ±{MAX_NUMBER}, got {value}"
        )
    if not isinstance(value, dict):
        return value
    content = {
        key: _build(v, about, about.nested, f"{where}: {key}")
        for key, v in value.items()
        if key not in ("_target_", "_recursive_", "_convert_")
    }
    if "_target_" not in value and allowed is not about.classes:
        return content
    target = value.get("_target_")
    if target not in allowed:
        raise ConfigError(
            f"sam3d_dir: {where}: expected {' or '.join(allowed) or 'no class'} as _target_, got {target!r}"
        )
    if special := sorted(str(key) for key in content if str(key).startswith("_")):
        raise ConfigError(
            f"sam3d_dir: {where}: expected arguments of {target}, got {', '.join(special)}"
        )
    module, _, name = target.rpartition(".")
    try:
        return getattr(_import(module), name)(**content)
    except FastLoRAError:
        raise
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"sam3d_dir: {where}: {name} cannot be built: {error}") from error


# ---------------------------------------------------------------------------------------- weights


def _read_weights(path: Path, about: Part) -> dict[str, Tensor]:
    """The tensors of a file by name: a bare state dict, or the entry `state_dict` of a generator's `.ckpt`."""
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        state = files.read_torch(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"sam3d_dir: cannot read {path}: {error}") from error
    if about.generator:
        state = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        where = " under 'state_dict'" if about.generator else ""
        raise CheckpointError(f"sam3d_dir: {path}: expected tensors by name{where}")
    return state
