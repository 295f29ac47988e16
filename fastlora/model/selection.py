"""Which layers a `LoRAConfig` selects, and why: read-only, for `inject_lora` and for the reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from fastlora.config import (
    ALL_LINEAR,
    KINDS,
    PATTERNS,
    LoRAConfig,
    Targets,
    layer_index,
)
from fastlora.errors import ConfigError, InjectionError, nearest
from fastlora.layers.banks import named_layers, why_not_experts
from fastlora.layers.base import named_lora_layers
from fastlora.layers.kinds import kind_of, why_unsuitable
from fastlora.layers.offload import loaded_from_above, offload_hook
from fastlora.layers.several import SeveralAdapters
from fastlora.model.adapter_registry import inactive_adapters
from fastlora.model.defaults import Rule, default_layers
from fastlora.model.experts import routers, stacked_weights
from fastlora.model.from_peft import PeftTargets, from_peft, is_pefts
from fastlora.model.peft_rules import output_embeddings

# The layers to wrap, each with its path and a config with its own rank, alpha and dropout.
Selection = dict[nn.Module, tuple[str, LoRAConfig]]
Status = Literal["selected", "excluded", "not targeted"]


@dataclass(frozen=True, eq=False)
class Decision:
    """Whether a config selects one layer under one of its names.

    config: has the layer's own rank, alpha and dropout if it is selected, else None.
    pattern: the pattern, or the rule for default targets, that selected or excluded it; None for a callback and for a layer that matches nothing.
    """

    path: str
    module: nn.Module
    status: Status
    reason: str
    config: LoRAConfig | None = None
    pattern: str | None = None


def to_config(
    model: nn.Module,
    target_modules: Targets | LoRAConfig | None,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
) -> LoRAConfig:
    """The arguments of `inject_lora` as a config. Raises: ConfigError if a config and values are both given, or as `from_peft`."""
    given = {"rank": rank, "alpha": alpha, "dropout": dropout}
    is_config = is_pefts(target_modules) or isinstance(target_modules, LoRAConfig)
    if is_config and given == {"rank": 4, "alpha": 8.0, "dropout": 0.0}:
        given = {}  # the defaults of the signature
    return config_of(model, target_modules, given)


def config_of(model: nn.Module, target_modules: object, given: Mapping[str, Any]) -> LoRAConfig:
    """Targets, compared as in `inject_lora` unless `match` is given, and other fields of a `LoRAConfig` as a config.

    Raises: ConfigError for an invalid or unknown field, if a config and fields are both given, or as `from_peft`.
    """
    pefts = is_pefts(target_modules)
    if pefts or isinstance(target_modules, LoRAConfig):
        if given:
            raise ConfigError(
                f"{', '.join(given)}: set them in the {type(target_modules).__name__} only"
            )
        return from_peft(model, target_modules) if pefts else cast(LoRAConfig, target_modules)
    if isinstance(target_modules, (type, nn.Module)):
        name = getattr(target_modules, "__name__", type(target_modules).__name__)
        raise ConfigError(
            f"target_modules: expected patterns, a callback or a config (a LoRAConfig, PEFT's LoraConfig), got {name}"
        )
    return LoRAConfig.from_dict(
        {"target_modules": target_modules, "match": "contains"} | dict(given)
    )


def decide(model: nn.Module, config: LoRAConfig) -> list[Decision]:
    """A decision on every layer of the config's kinds outside adapted layers, suitable or not, under each of its names.

    A layer with several names is selected under the first that matches; later names are omitted.

    Raises: ConfigError if a callback returns neither a bool nor a LoRAConfig.
    """
    spared: dict[nn.Module, str] = {}
    if ALL_LINEAR in config.targets:
        spared = dict.fromkeys(routers(model), "routers of experts")
        head = output_embeddings(model)
        spared |= {} if head is None else {head: "the output embeddings"}
    defaults = default_layers(model) if config.target_modules is None else {}
    wrapped = {id(layer.wrapped) for _, layer in named_lora_layers(model)}
    decisions: list[Decision] = []
    taken: set[nn.Module] = set()
    for path, module in candidates(model, config):
        if module in taken or id(module) in wrapped:
            continue
        decision = _decide_layer(config, path, module, spared.get(module), defaults.get(module))
        decisions.append(decision)
        if decision.config is not None:
            taken.add(module)
    return decisions


def select_layers(model: nn.Module, config: LoRAConfig) -> Selection:
    """The layers to wrap.

    Raises: InjectionError if the model is itself a layer, already has adapters, active or not, or a selected layer cannot be adapted.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected an nn.Module, got {type(model).__name__}")
    inactive = inactive_adapters(model)
    if inactive:
        raise InjectionError(
            f"model: has the inactive adapters {', '.join(map(repr, inactive))}; add another one by name with "
            "fastlora.add_adapter, or delete them first"
        )
    if kind_of(model) is not None:
        raise InjectionError(
            f"model: is itself a {type(model).__name__}; an adapted layer needs a parent module"
            + ("; use LoRALinear(model, rank, alpha)" if isinstance(model, nn.Linear) else "")
        )
    existing = [path or "the model itself" for path, _ in named_lora_layers(model)]
    if existing:
        raise InjectionError(
            f"model: already has {len(existing)} adapted layers (first: {existing[0]}); "
            "merge them before injecting again, or add another adapter by name with fastlora.add_adapter"
        )
    selected = {
        decision.module: (decision.path, decision.config)
        for decision in decide(model, config)
        if decision.config is not None
    }
    above = loaded_from_above(model)
    problems = [(path, why_unsuitable(module, own)) for module, (path, own) in selected.items()]
    if isinstance(config.target_modules, PeftTargets):
        problems += config.target_modules.foreign.items()
    problems += [
        (path, f"accelerate loads it by name in the hook of {above[module] or 'the model'}")
        for module, (path, _) in selected.items()
        if module in above
    ]
    problems += [
        (path, "is compiled by itself, and goes on running its old code; compile after injection")
        for path, _ in selected.values()
        if path.rpartition(".")[2] == "_orig_mod"
    ]
    refused = [f"{path}: {reason}" for path, reason in problems if reason is not None]
    if refused:
        raise InjectionError("cannot adapt " + "; ".join(refused))
    return selected


def extra_trainable(
    model: nn.Module, config: LoRAConfig, selected: Selection
) -> list[nn.Parameter]:
    """The parameters that train because of `modules_to_save` and `bias`.

    Raises: InjectionError if a name in `modules_to_save` matches no module, or that module is or contains a selected layer.
    """
    adapted = sorted(path for path, _ in selected.values())
    heads = parameters_within(model, config.modules_to_save, adapted, "modules_to_save")
    biases = []
    for module, (_, own) in selected.items():
        bias = module._parameters.get("bias")
        if own.bias == "lora_only" and bias is not None:
            biases.append(bias)
    if config.bias == "all":
        # in_proj_bias of an attention and bias_ih_l0 of an LSTM too, as in PEFT
        biases += [p for name, p in model.named_parameters() if "bias" in name.rpartition(".")[2]]
    _refuse_offloaded(model, biases, "bias")
    return heads + biases


def parameters_within(
    model: nn.Module, names: Sequence[str], adapted: Sequence[str], argument: str
) -> list[nn.Parameter]:
    """Every parameter in the modules that `names` names: a path, or a dotted suffix of one.

    adapted: the paths of the layers that get an adapter. argument: the origin of `names`, for messages.

    Raises: InjectionError if a name matches no module, or that module is or contains an adapted layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[nn.Parameter] = []
    for wanted in names:
        paths = [path for path in modules if path == wanted or path.endswith(f".{wanted}")]
        if not paths:
            raise InjectionError(
                f"{argument}: {wanted!r} is not a module of the model{nearest_names(wanted, modules)}"
            )
        for path in paths:
            within = set(modules[path].modules())  # by identity: a shared module has several paths
            inside = next((a for a in adapted if modules[a] in within), None)
            if inside is not None:
                raise InjectionError(
                    f"{argument}: {path} is or contains {inside}, which gets an adapter"
                )
            found += modules[path].parameters()
    _refuse_offloaded(model, found, argument)
    return found


def _refuse_offloaded(model: nn.Module, trained: Sequence[nn.Parameter], argument: str) -> None:
    """Raises: InjectionError if accelerate offloads a module that is to train: its hook would discard the gradients."""
    above, heads = loaded_from_above(model), {id(parameter) for parameter in trained}
    for path, module in model.named_modules():
        owns = any(id(parameter) in heads for parameter in module.parameters(recurse=False))
        if owns and (offload_hook(module) is not None or module in above):
            raise InjectionError(
                f"{argument}: {path or 'the model'} is offloaded by accelerate, so training cannot change it"
            )


def unmatched_pattern(model: nn.Module, config: LoRAConfig, selected: Selection) -> str | None:
    """An error message on the first pattern or layer index that matches nothing; None if all match."""
    if isinstance(config.target_modules, PeftTargets):
        return _unmatched_by_peft(model, config.target_modules, selected)
    every = [path for path, _ in candidates(model, config)]
    taken = [path for path, _ in selected.values()]
    checked = [("target_modules", config.targets, every), ("exclude", config.exclude, every)]
    checked += [(name, getattr(config, name), taken) for name in PATTERNS]
    for name, patterns, paths in checked:
        for pattern in patterns:
            key = name in PATTERNS
            if pattern != ALL_LINEAR and not any(
                config.matches(pattern, p, key=key) for p in paths
            ):
                shown = pattern_text(pattern)
                return (
                    f"{name}: {shown!r} matches none of the {len(paths)} "
                    f"{'adapted' if paths is taken else '/'.join(config.kinds)} layers{nearest_names(shown, paths)}"
                    + _other_kind_hint(model, config, pattern)
                )
    numbers = {index for path in taken if (index := layer_index(path)) is not None}
    unused = [i for i in config.indices if i not in numbers]
    if unused:
        return f"layers_to_transform: no adapted layer has the index {unused[0]}; there are {sorted(numbers)}"
    if not selected and config.target_modules is None and not default_layers(model):
        return (
            "target_modules: expected patterns, since no rule for default targets recognises an attention layer in this model; "
            'pass names, or "all-linear" (fastlora.preview(model, "all-linear") shows its layers)'
        )
    if not selected:
        return f"target_modules: no layer was selected{suggest(model, config)}"
    return None


def _unmatched_by_peft(model: nn.Module, targets: PeftTargets, selected: Selection) -> str | None:
    """An error message if a LoraConfig selects nothing, or on the first of its names that matches nothing."""
    paths = [path for path, _ in model.named_modules()]
    if not selected:
        wanted = targets.rules.target_modules or targets.rules.target_parameters or ""
        first = wanted if isinstance(wanted, str) else wanted[0]
        return f"target_modules: {targets!r} selects no layer{nearest_names(first, paths)}"
    for name, pattern in targets.unused:
        return (
            f"{name}: {pattern!r} of the LoraConfig matches nothing{nearest_names(pattern, paths)}"
        )
    return None


def candidates(model: nn.Module, config: LoRAConfig) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every layer of the config's kinds under each of its names, also inside adapted layers."""
    for path, module in named_layers(model, remove_duplicate=False):
        if kind_of(module) in config.kinds:
            yield path, module


def _other_kind_hint(model: nn.Module, config: LoRAConfig, pattern: str | re.Pattern[str]) -> str:
    """A hint for an error message: a layer of another kind, or of none (GPTQ's, AWQ's), that the pattern matches."""
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind in config.kinds or not config.matches(pattern, path):
            continue
        name = f" It matches the {type(module).__name__} {path}"
        if kind is not None:
            return f"{name}, if kinds has {kind!r}."
        if not module._modules:
            return f"{name}, which is none of {', '.join(KINDS)}."
    for path in stacked_weights(model):
        if config.matches(pattern, path):
            owner = model.get_submodule(path.rpartition(".")[0])
            why = why_not_experts(owner) or "it is not one of the projections of its experts"
            return f" It matches the parameter {path}, stacked matrices that get no adapter: {why}."
    return ""


def attention_projections(model: nn.Module) -> set[nn.Module]:
    """The direct children of every `nn.MultiheadAttention`, which reads their weights and does not call them, and the wrappers in them."""
    children = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    several = [child.layers for child in children if isinstance(child, SeveralAdapters)]
    return children.union(*several)


def fast_path_layers(model: nn.Module) -> set[nn.Module]:
    """linear1 and linear2 of every `nn.TransformerEncoderLayer` that has a fast path in eval mode, which reads their weights."""
    return {
        child
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer) and _has_fast_path(module)
        for child in (module.linear1, module.linear2)
    }


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    attention = layer.self_attn
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
    )


def suggest(model: nn.Module, config: LoRAConfig) -> str:
    """A hint for an error message: the names in the model nearest to the config's first target."""
    first = next((t for t in config.targets if isinstance(t, str)), "")
    return nearest_names(first, [path for path, _ in candidates(model, config)])


def pattern_text(pattern: str | re.Pattern[str]) -> str:
    """The pattern as a message shows it."""
    return pattern if isinstance(pattern, str) else pattern.pattern


def nearest_names(wanted: str, paths: Iterable[str]) -> str:
    """The end of an error message: the path components nearest to `wanted`, or else a few of them."""
    parts = {part for path in paths for part in path.split(".")}
    components = sorted(part for part in parts if part and not part.isdigit())
    if not components:
        return "; there are no such layers in the model"
    return nearest(wanted, components) or f"; there are {', '.join(components[:5])}"


def _decide_layer(
    config: LoRAConfig, path: str, module: nn.Module, spared: str | None, rule: Rule | None
) -> Decision:
    named = config.match == "exact" and path in config.targets
    if config.indices and layer_index(path) not in config.indices and not named:
        wanted = ", ".join(map(str, config.indices))
        reason = f"layers_to_transform selects {wanted} only"
        return Decision(path, module, "not targeted", reason)
    for pattern in config.exclude:
        if config.matches(pattern, path):
            shown = pattern_text(pattern)
            return Decision(path, module, "excluded", f"exclude has {shown!r}", pattern=shown)
    by = "the LoraConfig" if isinstance(config.target_modules, PeftTargets) else "the callback"
    chosen, reason = None, f"{by} selected it"
    if callable(config.target_modules):
        answer = config.target_modules(path, module)
        if not isinstance(answer, (bool, LoRAConfig)):
            raise ConfigError(
                f"target_modules: the callback must return a bool or a LoRAConfig, got {answer!r} for {path}"
            )
        if answer is False:
            return Decision(path, module, "not targeted", f"{by} did not select it")
        config = config if answer is True else answer
    elif config.target_modules is None:
        if rule is None:
            reason = "no rule for default targets chooses it"
            return Decision(path, module, "not targeted", reason)
        chosen = rule.name
        reason = f"default targets: rule {chosen!r}"
    else:
        found = [
            pattern
            for pattern in config.targets
            if (spared is None if pattern == ALL_LINEAR else config.matches(pattern, path))
        ]
        if not found:
            reason = "no target matches its path"
            if spared is not None:
                reason = f"all-linear excludes {spared}"
            return Decision(path, module, "not targeted", reason)
        chosen = pattern_text(found[0])
        reason = f"matches {chosen!r}"

    def by_pattern(name: str) -> Any:
        patterns = getattr(config, f"{name}_pattern").items()
        found = (value for pattern, value in patterns if config.matches(pattern, path, key=True))
        return next(found, getattr(config, name))

    own = replace(config, **{name: by_pattern(name) for name in ("rank", "alpha", "dropout")})
    return Decision(path, module, "selected", reason, config=own, pattern=chosen)
