"""Parts of the user's own SAM 3D Objects: the public package, and the checkpoint folder that it is given.

The folder holds `pipeline.yaml`, which names a YAML file and a file of weights for each part. The package builds whatever those
files name; here they are data. A part is one of a few classes that this module knows, built from plain values, its weights are
read without running anything, and every tensor must have its place.
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
"""What the package reads when it is imported, and what it is told where the user says nothing."""

TARGETS = ("to_qkv", "to_q", "to_kv", "to_out", "mlp")
"""Path components of the layers that take adapters, in any part."""

MAX_RESOLUTION = 128  # of the decoder's voxels: its grid of (4·128)³ cubes takes 9 GB
MAX_NUMBER = 2**16  # of any other whole number in a part's YAML

_MODELS = "sam3d_objects.model.backbone.tdfy_dit.models"
_SPARSE = "sam3d_objects.model.backbone.tdfy_dit.modules.sparse"


@dataclass(frozen=True)
class Part:
    """A part of the pipeline.

    name: its prefix in pipeline.yaml. classes: what its YAML may name. nested: what may stand below that. generator: whether the
    model lies inside a generator's YAML (`module.generator.backbone`) and a training checkpoint, or is the whole of both.
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
_WRAPPERS = (
    "reverse_fn",
    "backbone",
)  # solvers and guidance around the model, which have no weights
_EMBEDDER = "condition_embedder"  # may stand in a generator's model; what it makes of an image is given instead


def load_part(sam3d_dir: str | Path, part: str, device: str = "cpu") -> nn.Module:
    """A part with its weights, frozen and in eval mode: "decoder", or the flow model of "slat" or "structure".

    sam3d_dir: the folder of pipeline.yaml. device: of the model's own constants; the weights stay on the CPU.

    Raises:
        ConfigError: the part is not known, `sam3d_objects` cannot be imported, or a YAML file names a class that is not this
            part's, asks for what is not a plain value, or cannot be built.
        CheckpointError: a file is missing, unreadable or outside the folder, or its tensors are not the model's.
    """
    if part not in PARTS:
        raise ConfigError(f"sam3d_parts: expected some of {', '.join(PARTS)}, got {part!r}")
    about, folder = PARTS[part], Path(sam3d_dir)
    pipeline = _mapping(folder / "pipeline.yaml")
    config_path = _inside(folder, pipeline, f"{about.name}_config_path")
    weights_path = _inside(folder, pipeline, f"{about.name}_ckpt_path")
    config, prefix = _mapping(config_path), ""
    if about.generator:
        config, prefix = _flow_model(config, config_path, about)
    left_out = _EMBEDDER if about.generator else "pretrained_ckpt_path"
    arguments = {key: value for key, value in config.items() if key != left_out}
    if part == "decoder":
        _check_resolution(arguments.get("resolution"), config_path)
        arguments["device"] = device
    model = _build(arguments, about, about.classes, str(config_path))
    assert isinstance(model, nn.Module)
    state = _read_weights(weights_path, about)
    if about.generator:
        state = _without_prefix(state, _GENERATOR_KEYS + prefix, weights_path)
    check_tensors(state, model.state_dict(), str(weights_path))
    if whole := sorted(key for key, value in state.items() if not value.is_floating_point()):
        raise CheckpointError(
            f"sam3d_dir: {weights_path}: expected floating-point tensors, got {whole}"
        )
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def latent_shape(sam3d_dir: str | Path) -> tuple[int, int]:
    """The resolution of the mesh decoder's grid and its latent channels, as its YAML says. Raises: as `load_part`."""
    folder, name = Path(sam3d_dir), PARTS["decoder"].name
    path = _inside(folder, _mapping(folder / "pipeline.yaml"), f"{name}_config_path")
    config = _mapping(path)
    resolution, channels = config.get("resolution"), config.get("latent_channels")
    _check_resolution(resolution, path)
    if type(channels) is not int or channels < 1:
        raise ConfigError(f"sam3d_dir: {path}: latent_channels: expected >= 1, got {channels!r}")
    assert isinstance(resolution, int)
    return resolution, channels


@dataclass(frozen=True)
class GeneratorSettings:
    """What a generator's YAML says of its latents and of its training.

    resolution: of the grid of "slat"; None of "structure". condition_channels: of the embedded condition.
    latents: (tokens, channels) of each latent by name, tokens None where any number may be; "slat" has one, named "feats".
    sigma_min, time_scale: of the flow. time_mean, time_std: of the normal distribution whose logistic the times are.
    loss_weights: of each latent in the loss.
    """

    resolution: int | None
    condition_channels: int
    latents: dict[str, tuple[int | None, int]]
    sigma_min: float = 0.0
    time_scale: float = 1000.0
    time_mean: float = 0.0
    time_std: float = 1.0
    loss_weights: dict[str, float] = field(default_factory=dict)


def read_generator(sam3d_dir: str | Path, part: str) -> GeneratorSettings:
    """The settings of "slat" or "structure". Raises: as `load_part`, and ConfigError where a value cannot be used."""
    about, folder = PARTS[part], Path(sam3d_dir)
    path = _inside(folder, _mapping(folder / "pipeline.yaml"), f"{about.name}_config_path")
    config = _mapping(path)
    model, _ = _flow_model(config, path, about)
    flow = config
    for step in _GENERATOR_YAML:
        flow = flow[step]
    where = f"sam3d_dir: {path}"
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
    return GeneratorSettings(
        resolution=_whole(model, "resolution", where) if part == "slat" else None,
        condition_channels=_whole(model, "cond_channels", where),
        latents=latents,
        sigma_min=_number(flow, "sigma_min", 0.0, where),
        time_scale=_number(flow, "time_scale", 1000.0, where),
        time_mean=_number(sampler, "mean", 0.0, where),
        time_std=_number(sampler, "std", 1.0, where),
        loss_weights={name: _number(weights, name, 1.0, where) for name in latents},
    )


def latent_scale(sam3d_dir: str | Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel by which the SLat generator normalises.

    `slat_mean` and `slat_std` of pipeline.yaml; without them the package's own.

    Raises:
        ConfigError: they are no lists of numbers of one length, or not there and the package's cannot be imported.
    """
    path = Path(sam3d_dir) / "pipeline.yaml"
    pipeline = _mapping(path)
    mean, std = pipeline.get("slat_mean"), pipeline.get("slat_std")
    if mean is None or std is None:
        package = _import("sam3d_objects.pipeline.inference_utils")
        mean, std = package.SLAT_MEAN.tolist(), package.SLAT_STD.tolist()
    if not _are_numbers(mean) or not _are_numbers(std) or len(mean) != len(std) or min(std) <= 0:
        raise ConfigError(
            f"sam3d_dir: {path}: slat_mean, slat_std: expected two lists of numbers of one length, the second positive, "
            f"got {mean!r} and {std!r}"
        )
    return mean, std


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(map(_is_number, values))


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
    """How many tokens a latent's position embedder is for, where its arguments say so."""
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
            f"model: 'sam3d' needs the package sam3d_objects and what it imports ({error}); "
            "docs/sam3d.md says how to install it"
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


def _inside(folder: Path, pipeline: Mapping[str, Any], key: str) -> Path:
    """The file that pipeline.yaml names below its folder."""
    name = pipeline.get(key)
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"sam3d_dir: {folder / 'pipeline.yaml'}: expected a path under {key!r}, got {name!r}"
        )
    path = folder / name
    # A download may keep its files elsewhere and link to them: no name may leave the folder, the user's own links may.
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise CheckpointError(
            f"sam3d_dir: {key}: expected a path inside {folder}, got {name!r}, which leaves it"
        )
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"sam3d_dir: {key}: {error}") from error
    if not there:
        raise CheckpointError(f"sam3d_dir: {key}: no file {path}")
    return path


def _flow_model(config: Any, path: Path, about: Part) -> tuple[dict[str, Any], str]:
    """The YAML of the model inside a generator's, and the prefix that its tensors have there."""
    for step in _GENERATOR_YAML:
        config = config.get(step) if isinstance(config, dict) else None
    prefix = ""
    while isinstance(config, dict) and config.get("_target_") not in about.classes:
        inner = next((name for name in _WRAPPERS if isinstance(config.get(name), dict)), None)
        if inner is None:
            raise ConfigError(
                f"sam3d_dir: {path}: expected one of {', '.join(about.classes)} as _target_, got {config.get('_target_')!r}"
            )
        config, prefix = config[inner], f"{prefix}{inner}."
    if not isinstance(config, dict):
        raise ConfigError(f"sam3d_dir: {path}: expected a model under {'.'.join(_GENERATOR_YAML)}")
    return config, prefix


def _check_resolution(value: Any, path: Path) -> None:
    if type(value) is not int or not 8 <= value <= MAX_RESOLUTION or value % 8:
        raise ConfigError(
            f"sam3d_dir: {path}: resolution: expected a multiple of 8 up to {MAX_RESOLUTION}, got {value!r}"
        )


def _build(value: Any, about: Part, allowed: tuple[str, ...], where: str) -> Any:
    """An object of the YAML: plain values as they are, and what has a `_target_` out of `allowed`, or `about.nested` below it."""
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
    """The tensors of a file by name: a bare state dict, or for a generator's `.ckpt` what lies under `state_dict`."""
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


def _without_prefix(state: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """A generator's tensors under the model's own names; those of other parts of the training are left out."""
    mine = {key: value for key, value in state.items() if key.startswith(_GENERATOR_KEYS)}
    if strangers := sorted(key for key in mine if not key.startswith(prefix)):
        raise CheckpointError(f"sam3d_dir: {path}: does not fit the model: {strangers} unexpected")
    own = {key.removeprefix(prefix): value for key, value in mine.items()}
    return {key: value for key, value in own.items() if not key.startswith(f"{_EMBEDDER}.")}
