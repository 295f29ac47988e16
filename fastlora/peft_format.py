"""PEFT's folder format both ways, without peft: `save_pretrained` and `from_pretrained`.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are `base_model.model.<path>.lora_A.weight`,
`….lora_B.weight` (`….lora_embedding_A` and `_B` without `.weight` for an embedding, `….lora_magnitude_vector` besides under DoRA), and `base_model.model.<path>.<name>` for whole modules that train (`modules_to_save`). The rules by which
the config finds layers are PEFT's, not those of `inject_lora`.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import adding, list_adapters
from fastlora.checkpoint import (
    LoadResult,
    compare,
    read_safetensors,
    refuse_complex,
    safetensors_bytes,
)
from fastlora.config import ALL_LINEAR, KINDS, LoRAConfig
from fastlora.embedding import LoRAEmbedding
from fastlora.errors import CheckpointError, ConfigError
from fastlora.files import check_regexes, read_json, write_files
from fastlora.inject import freeze_base_params, inject_lora
from fastlora.kinds import kind_of, layer_class, why_unsuitable
from fastlora.layer import LoRATransposedLinear
from fastlora.lora_layer import LoRALayer, check_hyperparameters
from fastlora.record import inactive_adapters
from fastlora.selection import named_lora_layers, nearest_names, output_embeddings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields that say nothing about what the saved adapter computes.
_IGNORED = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")  # those that leave W alone


@dataclass(frozen=True)
class PeftConfig:
    """The fields of `adapter_config.json` that fastlora acts on, under PEFT's names and with PEFT's defaults."""

    target_modules: str | list[str]
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False  # says so of Conv1D layers, which fastlora knows by their class
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would adapt, by path."""
        paths = dict(_base_modules(model))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            head = output_embeddings(model)
            return {
                path: module
                for path, module in paths.items()
                if kind_of(module) == "linear" and module is not head and not self._excludes(path)
            }
        return {path: module for path, module in paths.items() if self._takes(path)}

    def layer(self, path: str) -> LoRAConfig:
        """What the layer at `path` gets."""
        rank = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return LoRAConfig(
            rank=int(rank),
            alpha=alpha,
            dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def heads(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would train whole: those whose path ends with a name, dot or no dot before it."""
        names = tuple(self.modules_to_save or ())
        return {path: module for path, module in _base_modules(model) if path.endswith(names)}

    def _takes(self, path: str) -> bool:
        if self._excludes(path):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        return _has_suffix(path, self.target_modules) and self._takes_index(path)

    def _excludes(self, path: str) -> bool:
        excluded = self.exclude_modules or []
        if isinstance(excluded, str):
            by_name = re.fullmatch(excluded, path) is not None
        else:
            by_name = _has_suffix(path, excluded)
        heads = self.modules_to_save or []
        return by_name or any(re.match(_head_regex(head), path) for head in heads)

    def _takes_index(self, path: str) -> bool:
        """Whether the first index in the path (or the first after a pattern) is one of layers_to_transform."""
        indices = self.layers_to_transform
        if indices is None or indices == []:
            return True
        for regex in self._index_regexes():
            match = re.match(regex, path)
            if match:
                wanted = [indices] if isinstance(indices, int) else indices
                return int(match["index"]) in wanted
        return False

    def _index_regexes(self) -> list[str]:
        patterns = self.layers_pattern or [r"[^.]*"]
        anywhere = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
        return [
            rf"{anywhere}{pattern}\.(?P<index>\d+)\."
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]

    def check_matching(self, paths: Iterable[str]) -> None:
        """Raises: CheckpointError if a regex of the file would take forever on one of these paths."""
        regexes = [v for v in (self.target_modules, self.exclude_modules) if isinstance(v, str)]
        for key in {**self.rank_pattern, **self.alpha_pattern}:
            regexes += [_key_regex(key)] if _repeats(key) else []
        for head in self.modules_to_save or ():
            regexes += [_head_regex(head)] if _repeats(head) else []
        if self.layers_pattern:
            regexes += self._index_regexes()
        try:
            check_regexes(regexes, paths)
        except ValueError as error:
            raise CheckpointError(f"{CONFIG_FILE}: {error}") from None


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], include_trainable: bool = True
) -> None:
    """Write the adapters, and by default the trained heads, as a folder that PEFT and `from_pretrained` load.

    Layers may differ in rank, alpha and use_rslora; PEFT holds one dropout, so where layers differ the highest is written,
    with a warning. After PiSSA or OLoRA the start that is taken off is written as part of the adapter, which has twice the rank
    then: the folder goes with the base model as it was. Other files in the folder are left alone. Both files are written before the first takes its place.

    model: with adapters. folder: made if it is not there.
    include_trainable: also save every module that has a trained parameter of its own (`modules_to_save`), whole.

    Raises: CheckpointError if there is nothing to save, if a trained parameter cannot be said in this format (it belongs
    to an adapted layer or to the model itself), or if a file cannot be written.
    """
    layers = dict(named_lora_layers(model))
    if not layers:
        raise CheckpointError("model: has no adapters, so there is nothing to save")
    if "" in layers:
        raise CheckpointError(
            "model: is itself an adapted layer; PEFT's format needs it to have a name"
        )
    for path, layer in layers.items():
        reason = _why_peft_differs(layer.wrapped)
        if reason is not None:
            raise CheckpointError(f"model: {path}: {reason}; use save_adapter")
    _refuse_shared(model, layers.values())
    heads = _trained_modules(model, layers) if include_trainable else []
    config = _describe(model, layers, heads)
    state = {
        f"{PREFIX}{path}.{key}": tensor.detach()
        for path, layer in layers.items()
        for key, tensor in _saved_tensors(layer).items()
    }
    for path, module in config.heads(model).items():
        _refuse_adapted(path, layers)
        state |= {f"{PREFIX}{path}.{name}": v for name, v in module.state_dict().items()}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"folder: cannot make {target}: {error}") from error
    text = json.dumps(as_json(config, model), indent=2, sort_keys=True) + "\n"
    weights = safetensors_bytes(state, {"format": "pt"})
    write_files({target / WEIGHTS_FILE: weights, target / CONFIG_FILE: text.encode()})


def from_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None
) -> LoadResult:
    """Give a plain `model` the adapters and heads of a folder in PEFT's format, in place.

    Afterwards the adapters and the saved heads train and everything else is frozen. Parameters of the base that the file
    holds besides (PEFT adds resized embeddings) are loaded too.

    model: without adapters. folder: as PEFT's or fastlora's `save_pretrained` writes it; only safetensors are read.
    adapter: a name, under which the folder is loaded beside the adapters that the model has, without activating it (`set_adapter`
        does). If it is the only one, heads in the file become the
        model's, whichever adapter is active later. If there are others, only the new adapter's parameters change, and heads or base parameters in the file are refused.
    Returns the keys that were loaded, as they stand in the file.

    Raises: CheckpointError if a file is missing or damaged, if the config asks for what fastlora does not do (biases,
    a PiSSA start, …, by name), or if names or shapes do not fit, with the nearest candidates. With `adapter`, also what
    `add_adapter` raises about the name and the active adapter. The model is unchanged then.
    """
    if adapter is None:
        return _load(model, folder, alone=True)
    alone = not list_adapters(model)
    with adding(model, adapter) as plain:
        return _load(plain, folder, alone)


def _load(model: nn.Module, folder: str | os.PathLike[str], alone: bool) -> LoadResult:
    """alone: whether the model has no other adapters, so that what the folder holds besides is the model's."""
    if any(True for _ in named_lora_layers(model)):
        raise CheckpointError(
            "model: already has adapters; load into the plain base model, or give adapter="
        )
    inactive = inactive_adapters(model)
    if inactive:
        raise CheckpointError(
            f"model: has the inactive adapters {', '.join(map(repr, inactive))}; give adapter="
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise CheckpointError(f"model: {meta} is on the meta device and cannot take a value")
    source = Path(folder)
    config = read_config(source / CONFIG_FILE)
    if not (source / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"folder: no such file: {source / WEIGHTS_FILE}; only safetensors are read"
        )
    state, _ = read_safetensors(source / WEIGHTS_FILE)
    config.check_matching([path for path, _ in _base_modules(model)])
    targets = config.targets(model)
    if not targets:
        raise CheckpointError(f"target_modules: {_no_match(config, model)}")
    plan = {path: config.layer(path) for path in targets}
    reasons = {
        path: why_unsuitable(module, plan[path]) or _why_peft_differs(module)
        for path, module in targets.items()
    }
    refused = [f"{path}: {reason}" for path, reason in reasons.items() if reason is not None]
    if refused:
        raise CheckpointError("target_modules: cannot adapt " + "; ".join(refused[:3]))
    _refuse_shared(model, targets.values())
    heads = config.heads(model)
    for path in heads:
        both = overlap(path, plan)
        if both:
            raise CheckpointError(f"modules_to_save: {path} holds or is part of the target {both}")
    _check_keys(model, state, targets, plan, heads)
    _check_ties(model, state, heads)
    adapted = tuple(f"{PREFIX}{path}." for path in plan)
    besides = [key for key in state if not key.startswith(adapted)]
    if besides and not alone:
        raise CheckpointError(
            f"adapter: the file also holds {besides[0]}, which all adapters of the model would share; "
            "load it into a model of its own"
        )
    own = model.state_dict()
    refuse_complex({k.removeprefix(PREFIX): v for k, v in state.items()}, own)
    inject_lora(model, LoRAConfig(lambda path, _: plan.get(path, False), kinds=KINDS))
    if alone:
        freeze_base_params(model)
    for head in heads.values():
        head.requires_grad_(True)
    own = model.state_dict(keep_vars=True)
    for path, layer in named_lora_layers(model):
        names = _names(type(layer))
        own |= {f"{path}.{names[n]}": p for n, p in layer.lora_parameters().items()}
    with torch.no_grad():
        for key, value in state.items():
            own[key.removeprefix(PREFIX)].copy_(value)
    return LoadResult(list(state), [], [])


def _check_keys(
    model: nn.Module,
    state: Mapping[str, Tensor],
    targets: Mapping[str, nn.Module],
    plan: Mapping[str, LoRAConfig],
    heads: Mapping[str, nn.Module],
) -> None:
    shapes = {}
    for path, module in targets.items():
        kind = layer_class(module)
        names, (shape_a, shape_b) = _names(kind), kind.factor_shapes(module, plan[path].rank)
        shapes[f"{PREFIX}{path}.{names['lora_A']}"] = torch.Size(shape_a)
        shapes[f"{PREFIX}{path}.{names['lora_B']}"] = torch.Size(shape_b)
        if plan[path].use_dora:
            shapes[f"{PREFIX}{path}.{names['lora_magnitude']}"] = torch.Size(shape_b[:1])
    wanted = list(shapes)
    for path, head in heads.items():
        wanted += [f"{PREFIX}{path}.{name}" for name in head.state_dict()]
    adapted = tuple(f"{path}." for path in plan)
    for name, value in model.state_dict().items():
        if not name.startswith(adapted):
            shapes[PREFIX + name] = value.shape
    _, _, _, problems = compare(state, wanted, shapes)
    if problems:
        summary = f"{len(problems)} problems, nothing was changed:\n  "
        raise CheckpointError(
            f"{WEIGHTS_FILE} does not fit the model: {summary}" + "\n  ".join(problems)
        )


def _why_peft_differs(module: nn.Module) -> str | None:
    """Why an adapter of the same tensors computes something else in PEFT, or None if it does not."""
    if kind_of(module) != "conv":
        return None
    plain: dict[str, Any] = {"groups": 1, "padding_mode": "zeros"}
    plain["dilation"] = tuple(1 for _ in module.dilation)  # type: ignore[union-attr]
    others = [
        f"{name}={value}" for name in plain if (value := getattr(module, name)) != plain[name]
    ]
    if not others:
        return None
    return f"PEFT's adapter of a {type(module).__name__} with {', '.join(others)} is no update of its weight"


def _names(kind: type[LoRALayer]) -> dict[str, str]:
    """fastlora's names of an adapter's parameters -> those of PEFT's files."""
    if issubclass(kind, LoRAEmbedding):
        return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    return {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude": "lora_magnitude_vector",
    }


def _saved_tensors(layer: LoRALayer) -> dict[str, Tensor]:
    """The adapter under PEFT's names, a start that is taken off being part of it."""
    made: dict[str, Tensor] = {**layer.lora_parameters()}
    made["lora_A"], made["lora_B"] = layer.factors()
    names = _names(type(layer))
    return {names[name]: tensor for name, tensor in made.items()}


def _as_config(layer: LoRALayer) -> LoRAConfig:
    """The rank and alpha of `_saved_tensors`, whose scaling is the layer's own."""
    rank = layer.factors()[0].shape[0]
    alpha = layer.alpha if rank == layer.rank else layer.scaling * _divisor(rank, layer.use_rslora)
    return LoRAConfig(rank=rank, alpha=alpha, dropout=layer.dropout, use_rslora=layer.use_rslora)


def _divisor(rank: int, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else rank


def _check_ties(
    model: nn.Module, state: Mapping[str, Tensor], heads: Mapping[str, nn.Module]
) -> None:
    """A head that PEFT trained was cut loose from the parameters it was tied to; here it is still tied to them."""
    own = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    for path, head in heads.items():
        for name in (f"{path}.{key}" for key in head.state_dict()):
            for other in names[id(own[name])]:
                value = state.get(PREFIX + other)
                if other == name:
                    continue
                if value is None or not torch.equal(value, state[PREFIX + name]):
                    raise CheckpointError(
                        f"modules_to_save: {name} is tied to {other}, which the file gives another "
                        "value; untie them in the model first"
                    )


def _describe(model: nn.Module, layers: dict[str, LoRALayer], heads: list[str]) -> PeftConfig:
    """The config from which PEFT's rules find exactly these layers with these ranks and alphas."""
    use_dora = {layer.lora_magnitude is not None for layer in layers.values()}
    if len(use_dora) > 1:
        raise CheckpointError(
            "model: some layers have DoRA and some do not; PEFT's format cannot say that, use save_adapter"
        )
    settings = {path: _as_config(layer) for path, layer in layers.items()}
    # An embedding has no dropout, whatever the others have.
    dropouts = {
        layer.dropout for layer in layers.values() if not isinstance(layer, LoRAEmbedding)
    } or {0.0}
    if len(dropouts) > 1:
        warnings.warn(
            f"save_pretrained: layers have the dropouts {sorted(dropouts)}, PEFT's format holds one; "
            f"{max(dropouts)} is written",
            stacklevel=3,
        )
    names = sorted({path.rpartition(".")[2] for path in layers})
    regex = "|".join(re.escape(path) for path in layers)
    for targets in (names, sorted(layers), regex):
        config = replace(config_for(targets, settings, heads), use_dora=use_dora == {True})
        if config.targets(model).keys() == layers.keys():
            return config
    missed = layers.keys() - config.targets(model).keys()
    raise CheckpointError(
        f"model: {min(missed)} lies in a part of the model that is saved whole; "
        "PEFT's format cannot say that, use save_adapter"
    )


def config_for(
    targets: str | list[str],
    layers: Mapping[str, LoRAConfig],
    heads: list[str],
) -> PeftConfig:
    """The config that gives these layers, named by `targets`, their ranks and alphas; the highest dropout where they differ."""
    stabilised = {layer.use_rslora for layer in layers.values()}
    use_rslora = stabilised == {True}
    alphas = {
        path: layer.alpha
        * (_divisor(layer.rank, True) if layer.use_rslora and not use_rslora else 1)
        for path, layer in layers.items()
    }
    ranks = {path: layer.rank for path, layer in layers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return PeftConfig(
        targets,
        r=int(rank),
        lora_alpha=alpha,
        lora_dropout=max(layer.dropout for layer in layers.values()),
        use_rslora=use_rslora,
        modules_to_save=heads or None,
        rank_pattern={f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
    )


def as_json(config: PeftConfig, model: nn.Module) -> dict[str, Any]:
    """What `adapter_config.json` holds, with every field that PEFT expects."""
    name = getattr(model, "name_or_path", None)

    def whole(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    return vars(config) | {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(m, LoRATransposedLinear) for m in model.modules()),
        "init_lora_weights": True,
        "lora_alpha": whole(config.lora_alpha),
        "alpha_pattern": {key: whole(value) for key, value in config.alpha_pattern.items()},
    }


def _trained_modules(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Paths of the modules that own a trained parameter besides the adapters, without those inside another of them."""
    adapters = {id(p) for layer in layers.values() for p in layer.lora_parameters().values()}
    owners: dict[str, None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad or id(parameter) in adapters:
            continue
        owner = name.rpartition(".")[0]
        if not owner:
            raise CheckpointError(
                f"model: {name} trains and belongs to the model itself, which PEFT's format cannot "
                "say; use save_adapter"
            )
        _refuse_adapted(owner, layers)
        module = model.get_submodule(owner)
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise CheckpointError(
                f"model: {name} trains and belongs to a {type(module).__name__}, which PEFT cannot "
                "save whole; use save_adapter"
            )
        owners[owner] = None
    return [p for p in owners if not any(p.startswith(f"{outer}.") for outer in owners)]


def _refuse_adapted(path: str, layers: Mapping[str, LoRALayer]) -> None:
    adapted = overlap(path, layers)
    if adapted:
        raise CheckpointError(
            f"model: {path} would be saved whole and holds or is part of the adapted {adapted}. "
            "PEFT's format has no biases or weights of adapted layers: freeze them (freeze_base_params, bias='none'), use "
            "include_trainable=False, or save_adapter"
        )


def overlap(path: str, adapted: Iterable[str]) -> str | None:
    """The first adapted layer that is, holds, or is held by the module at `path`."""
    for other in adapted:
        if f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}."):
            return other
    return None


def _refuse_shared(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """A module under two names: PEFT adapts it under the first, fastlora under both."""
    wanted = {id(module) for module in modules}
    places: dict[int, str] = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            here = f"{path}.{name}".lstrip(".")
            if id(child) in wanted and places.setdefault(id(child), here) != here:
                raise CheckpointError(
                    f"model: {here} and {places[id(child)]} are one module; PEFT adapts it under one "
                    "of its names only"
                )


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as in the plain model: what is inside an adapted layer is left out."""
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = f"{path}." if isinstance(module, LoRALayer) else None
        if path:
            yield path, module


def _has_suffix(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((v for key, v in patterns.items() if re.match(_key_regex(key), path)), default)


def _key_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _head_regex(head: str) -> str:
    return rf"(^|.*\.){head}($|\..*)"


def _repeats(pattern: str) -> bool:
    return any(character in pattern for character in "*+?{|")


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _no_match(config: PeftConfig, model: nn.Module) -> str:
    wanted = config.target_modules
    first = wanted if isinstance(wanted, str) else wanted[0]
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return f"{wanted!r} matches no layer of the model. {nearest_names(first, paths)}"


def read_config(file: Path) -> PeftConfig:
    """Raises: CheckpointError with one line that names the file and the field."""
    if not file.is_file():
        raise CheckpointError(f"folder: no such file: {file}")
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected 'LORA', got {raw.get('peft_type')!r}")
    fields = PeftConfig.__dataclass_fields__
    for key, value in raw.items():
        if key in _IGNORED or key in fields or value in (None, False, [], {}, ""):
            continue
        if key == "bias" and value == "none":
            continue
        if key == "init_lora_weights" and value in _INITIALISATIONS:
            continue
        raise CheckpointError(f"{file}: {key}={value!r} is not supported by fastlora")
    for key, (expected, fits) in _CHECKS.items():
        if key in raw and not fits(raw[key]):
            raise CheckpointError(f"{file}: {key}: expected {expected}, got {raw[key]!r}")
    if raw.get("target_modules") is None:
        raise CheckpointError(f"{file}: target_modules: expected a list or a regex, got None")
    known = {key: raw[key] for key in fields if raw.get(key) is not None}
    config = PeftConfig(**known)
    _check_values(file, config)
    return config


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_pattern(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target_modules": (
        "a list or a regex",
        lambda v: v is None or (bool(v) and (isinstance(v, str) or _is_names(v))),
    ),
    "exclude_modules": (
        "a list or a regex",
        lambda v: v is None or isinstance(v, str) or _is_names(v),
    ),
    "modules_to_save": ("a list of names", lambda v: v is None or _is_names(v)),
    "layers_pattern": ("names", lambda v: v is None or isinstance(v, str) or _is_names(v)),
    "layers_to_transform": (
        "indices",
        lambda v: (
            v is None or _is_index(v) or (isinstance(v, list) and all(_is_index(i) for i in v))
        ),
    ),
    "rank_pattern": ("pattern → rank", lambda v: v is None or _is_pattern(v, int)),
    "alpha_pattern": ("pattern → alpha", lambda v: v is None or _is_pattern(v, (int, float))),
    "use_rslora": ("true or false", lambda v: v is None or isinstance(v, bool)),
    "use_dora": ("true or false", lambda v: v is None or isinstance(v, bool)),
    "fan_in_fan_out": ("true or false", lambda v: v is None or isinstance(v, bool)),
}


def _check_values(file: Path, config: PeftConfig) -> None:
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise CheckpointError(f"{file}: layers_to_transform: needs a list of target_modules")
    try:
        for rank in (config.r, *config.rank_pattern.values()):
            check_hyperparameters(rank, config.lora_alpha, config.lora_dropout)
        for alpha in config.alpha_pattern.values():
            check_hyperparameters(config.r, alpha, config.lora_dropout)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    regexes = [v for v in (config.target_modules, config.exclude_modules) if isinstance(v, str)]
    layers = config.layers_pattern or []
    regexes += [*config.rank_pattern, *config.alpha_pattern, *(config.modules_to_save or [])]
    regexes += [layers] if isinstance(layers, str) else layers
    for regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise CheckpointError(f"{file}: {regex!r} is no regex: {error}") from None
