"""`adapter_config.json`: reading and writing it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastlora.errors import CheckpointError
from fastlora.files import check_regexes, read_json_object
from fastlora.model.peft_rules import PeftConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Fields that do not change what the saved adapter computes.
_IGNORED = {
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}
# Those that do not change W.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def as_json(config: PeftConfig) -> dict[str, Any]:
    """The content of `adapter_config.json`, with every field that PEFT expects."""

    def as_integer(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    # Older versions of PEFT do not know ensure_weight_tying, which has no effect on what is saved.
    known = {name: value for name, value in vars(config).items() if name != "ensure_weight_tying"}
    if not config.target_parameters:
        del known["target_parameters"]  # which older versions of PEFT do not know
    return known | {
        "peft_type": "LORA",
        "inference_mode": True,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": as_integer(config.lora_alpha),
        "alpha_pattern": {key: as_integer(value) for key, value in config.alpha_pattern.items()},
    }


def overlap(path: str, adapted: Iterable[str]) -> str | None:
    """The first adapted layer that is, contains, or is part of the module at `path`."""
    inside = f"{path}."
    return next((o for o in adapted if inside.startswith(f"{o}.") or o.startswith(inside)), None)


def check_matching(config: PeftConfig, paths: Iterable[str]) -> None:
    """Raises: CheckpointError if matching a regex of the file against these paths takes too long."""
    slow = [used for regex, used in config.regexes() if any(c in regex for c in "*+?{|")]
    try:
        check_regexes(slow, paths)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG_FILE}: {error}") from None


def read_config(file: Path) -> PeftConfig:
    """Raises: CheckpointError with one line that names the file and the field."""
    return config_of(read_json_object(file), str(file))


def config_of(raw: Mapping[str, Any], file: str) -> PeftConfig:
    """The config that the fields of a file describe. Raises: CheckpointError with one line that names the file and the field."""
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected 'LORA', got {raw.get('peft_type')!r}")
    defaults = {"bias": ("none",), "init_lora_weights": _INITIALISATIONS}
    for key, value in raw.items():
        known = key in _IGNORED or key in PeftConfig.__dataclass_fields__
        if known or value in (None, False, [], {}, ""):
            continue
        if value not in defaults.get(key, ()):
            raise CheckpointError(f"{file}: {key}={value!r} is not supported by fastlora")
    try:
        return PeftConfig.from_fields(raw)
    except ValueError as error:  # ConfigError is one
        raise CheckpointError(f"{file}: {error}") from None
