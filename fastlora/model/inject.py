"""Inject adapters; freeze, count and set up a model for fine-tuning."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastlora.config import ALL_LINEAR, DEFAULT_TARGETS, LoRAConfig, Targets, check_hyperparameters
from fastlora.errors import ConfigError, FastLoRAWarning, InjectionError, first_few
from fastlora.layers.banks import install_banks
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.initialise import initialise
from fastlora.layers.kinds import wrap
from fastlora.layers.offload import offload_hook
from fastlora.model.adapter_registry import none_active, record_peft
from fastlora.model.experts import stacked_weights
from fastlora.model.from_peft import PeftTargets
from fastlora.model.heads import (
    adapter_parameters,
    head_parameters,
    is_frozen,
    record_heads,
    record_unfrozen,
    recorded_parameters,
    remember_base,
    warn_of_changed_base,
)
from fastlora.model.pretrained import replace_methods
from fastlora.model.selection import (
    Selection,
    attention_projections,
    config_of,
    extra_trainable,
    nearest_names,
    parameters_within,
    select_layers,
    suggest,
    to_config,
    unmatched_pattern,
)
from fastlora.model.sharded import is_dtensor
from fastlora.model.wrappers import unwrapped

DEFAULT_OUTPUT_LAYERS = ("out_layer", "output_layer", "head")
_LARGE_SHARE = 0.1  # of the parameters, left out under "all-linear"
_FFN = ("mlp", "ffn", "fc1", "fc2")
log = logging.getLogger(__name__)


def inject_lora(
    model: nn.Module,
    target_modules: Targets | LoRAConfig | None = None,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
) -> int:
    """Wrap the matching linear layers of `model` in `LoRALinear`, in place.

    A target matches a layer if a component of its dotted path contains it: `to_qkv` matches `blocks.0.attn.to_qkv` and
    `to_qkv.pose`. Pass a `LoRAConfig` for exact names, globs, regular expressions, exclusions and ranks by layer.

    model: changed only if everything can be wrapped. A module under several names is wrapped once and stays shared.
    target_modules: patterns, "all-linear", a callback `(path, module) -> bool | LoRAConfig`, or a `LoRAConfig`, which then
        also has rank, alpha and dropout, or a `peft.LoraConfig`, whose layers, settings and initial values are those of PEFT. None
        chooses all attention projections (queries, keys, values and output) by the rules of docs/targets.md, and raises if none of
        them applies.
    rank, alpha, dropout: as in `LoRALinear`.
    Returns the number of layers wrapped. If nothing matches, warns and returns 0; if one pattern of several matches nothing,
    warns and wraps the rest; under a LoRAConfig both raise, under a LoraConfig only the first. Dropout on the projection of an `nn.MultiheadAttention` warns, since
    that module multiplies by the merged weight itself. `fastlora.preview` shows the result beforehand.

    Raises: ConfigError for an invalid value, or naming every field of a LoraConfig that is not supported. InjectionError if the model already has adapters (`fastlora.add_adapter` adds others by
    name), if a matching layer cannot be adapted, or if a pattern of a LoRAConfig matches nothing, with the nearest names.
    """
    config = to_config(model, target_modules, rank, alpha, dropout)
    selected = select_layers(model, config)
    problem = unmatched_pattern(model, config, selected)
    trained = extra_trainable(model, config, selected)
    strict = config.target_modules is None or isinstance(target_modules, LoRAConfig)
    if isinstance(config.target_modules, PeftTargets):
        strict = not selected
    if problem is not None and strict:
        raise InjectionError(problem)
    if not selected:
        warnings.warn(
            f"inject_lora: no layer matches {target_modules!r}; nothing was changed"
            f"{suggest(model, config)}",
            FastLoRAWarning,
            stacklevel=2,
        )
    elif problem is not None:
        warnings.warn(f"inject_lora: {problem}", FastLoRAWarning, stacklevel=2)
    _warn_of_experts(model, config)
    count = _wrap(model, selected)
    record_heads(model, trained)
    if isinstance(config.target_modules, PeftTargets):
        rules = config.target_modules.rules
        record_peft(unwrapped(model), {"task_type": rules.task_type})
    return count


def adapt(
    model: nn.Module, target_modules: Targets | LoRAConfig | Any = None, **fields: Any
) -> list[nn.Parameter]:
    """Inject adapters and freeze the base: `inject_lora`, `freeze_base_params` and `get_trainable_params` in one call.

    target_modules: as in `inject_lora`; None chooses all attention projections.
    fields: other fields of a `LoRAConfig`, if target_modules is not one: `adapt(model, "all-linear", rank=8, use_dora=True)`.
    Returns every parameter that trains, for an optimizer: the adapters, and what `modules_to_save` and `bias` name.

    Raises: ConfigError for an invalid or unknown field, or if a config and fields are both given; InjectionError as `inject_lora` under a
    LoRAConfig.
    The model is unchanged then.
    """
    inject_lora(model, config_of(model, target_modules, fields))
    freeze_base_params(model)
    return get_trainable_params(model)


def _warn_of_experts(model: nn.Module, config: LoRAConfig) -> None:
    """Warn if "all-linear" leaves out a large share of the model: matrices that are stacked in parameters, as those of experts."""
    if ALL_LINEAR not in config.targets:
        return
    stacks = stacked_weights(model)
    share = sum(p.numel() for p in stacks.values()) / max(1, count_parameters(model)["total"])
    if share > _LARGE_SHARE:
        warnings.warn(
            f"inject_lora: all-linear adapts layers only and leaves out {share:.0%} of the model's parameters: "
            f"{first_few(list(stacks))} are stacked matrices (as of experts), which get no adapter",
            FastLoRAWarning,
            stacklevel=3,
        )


def freeze_base_params(model: nn.Module) -> tuple[int, int]:
    """Freeze all parameters except the adapters and the heads: those that `bias` and `modules_to_save` of the injected `LoRAConfig` name,
    output layers of `setup_lora_for_medical_finetuning`, heads that were loaded with an adapter, and what `get_trainable_params` returned.

    What was unfrozen by hand since an earlier call becomes a head too, with a warning: saved with the adapter, and trainable until its own
    `requires_grad_(False)`. Frozen normalisation layers go on updating their running statistics in training mode, which changes the
    model's output but is not saved: keep them in eval mode, or name them in `modules_to_save`. Saving warns if anything frozen changed
    and is not saved.

    Returns (frozen, trainable), counted in parameters (elements).

    Raises: InjectionError if the model has no adapters.
    """
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    if not adapters:
        raise InjectionError(
            f"{none_active(model)}, so everything would be frozen; inject or activate an adapter first"
        )
    unfrozen = record_unfrozen(model)
    if unfrozen:
        warnings.warn(
            f"freeze_base_params: {first_few(unfrozen)} train since an earlier call and are kept as heads; to freeze them, call "
            "requires_grad_(False) on them afterwards",
            FastLoRAWarning,
            stacklevel=2,
        )
    trainable = adapters | recorded_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    warn_of_changed_base(model, "freeze_base_params")
    remember_base(model)
    counts = count_parameters(model)
    return counts["total"] - counts["trainable"], counts["trainable"]


def reset_lora_parameters(model: nn.Module) -> int:
    """Give the active adapter new initial values, as `inject_lora` did, so that ΔW = 0. Returns the number of its layers.

    For a model that was built on the meta device: after `to_empty`, which fills the adapter with NaN, or after
    `load_state_dict(…, assign=True)`, which leaves it on meta, so that it becomes new parameters here. Otherwise parameters stay the same
    objects. `requires_grad` does not change. DoRA, PiSSA and OLoRA read the weights: load those first. FSDP2 needs "kaiming" or
    "gaussian" without DoRA.

    Raises: InjectionError, naming each layer, if the model has no adapters, if a weight has no memory yet (on meta), if the adapter is
    offloaded or subtracts an initial product of unknown origin, or if FSDP2 shards tensors that its method needs whole. The model is
    unchanged then.
    """
    layers = dict(named_lora_layers(model))
    if not layers:
        raise InjectionError(f"{none_active(model)}, so there is nothing to reset")
    problems = []
    for path, layer in layers.items():
        if layer.wrapped_device.type == "meta":
            problems.append(f"{path}: its weight is on the meta device; call to_empty first")
        elif offload_hook(layer) is not None:
            problems.append(
                f"{path}: accelerate offloads lora_A and lora_B, and would discard them"
            )
        elif layer.initial_A is not None and layer.init_lora_weights == "kaiming":
            problems.append(f"{path}: how its initial_A and initial_B were computed is unknown")
        elif is_dtensor(layer.lora_A) and (
            layer.lora_magnitude is not None
            or layer.init_lora_weights not in ("kaiming", "gaussian")
        ):
            problems.append(
                f"{path}: FSDP shards it, but DoRA and init_lora_weights={layer.init_lora_weights!r} need whole tensors; "
                "inject into a model with values, then shard it"
            )
    if problems:
        raise InjectionError("cannot reset " + "; ".join(problems))
    methods = {layer: layer.init_lora_weights for layer in layers.values()}
    for layer in methods:
        if layer.lora_A.is_meta:  # the weights were assigned, not copied into memory
            layer.to_empty(device=layer.wrapped_device, recurse=False)
        layer.reset_lora_parameters()
    for layer, method in methods.items():
        initialise(layer, method)
    remember_base(model, unknown=True)
    return len(layers)


def get_lora_params(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A, lora_B and, under DoRA, lora_magnitude of the model, each once, in module order.

    For an optimizer use `get_trainable_params`: heads and biases train too. Warns if there are any.
    """
    record_unfrozen(model)
    heads = head_parameters(model, known=True)
    if heads:
        warnings.warn(
            f"get_lora_params: returns only the adapters, but {first_few(list(heads))} train too; use get_trainable_params",
            FastLoRAWarning,
            stacklevel=2,
        )
    return adapter_parameters(model)


def get_trainable_params(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that trains, adapters and heads, each once, in module order: what an optimizer needs.

    The heads among them are recorded: they are saved with the adapter whatever `requires_grad` is later (in a copy for a moving
    average, or after freezing), and `freeze_base_params` keeps them trainable.

    Raises: InjectionError if the model has adapters and its base was not frozen, so that all of it would train.
    """
    if adapter_parameters(model):
        if not is_frozen(model):
            raise InjectionError(
                "model: its base is not frozen, so all of it would train; call freeze_base_params first"
            )
        record_heads(model, [p for p in head_parameters(model).values() if p.requires_grad])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "trainable", "lora"}: numbers of elements; a shared parameter counts once.

    Heads that were unfrozen by hand after `freeze_base_params` are recorded, as by `get_trainable_params`.
    """
    record_unfrozen(model)
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "lora": sum(p.numel() for p in adapter_parameters(model)),
    }


def print_trainable_parameters(model: nn.Module) -> None:
    """Print one line in PEFT's format: `trainable params: … || all params: … || trainable%: …`."""
    counts = count_parameters(model)
    percent = 100 * counts["trainable"] / max(1, counts["total"])
    print(
        f"trainable params: {counts['trainable']:,} || all params: {counts['total']:,} "
        f"|| trainable%: {percent:.4f}"
    )


def setup_lora_for_medical_finetuning(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
    unfreeze_output_layers: bool = True,
    output_layer_names: Sequence[str] | None = None,
    include_ffn: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Inject adapters into the attention projections, freeze the other parameters and unfreeze the output layers.

    rank_pattern: pattern → rank of the layers that match, instead of `rank`; their scaling stays alpha / rank. An output layer
        named here gets an adapter of that rank instead of being unfrozen.
    include_ffn: also adapt the layers under a component that contains `mlp`, `ffn`, `fc1` or `fc2`.
    output_layer_names: paths of modules or dotted suffixes of them, each of which must match. None takes those of `out_layer`,
        `output_layer` and `head` that the model has, at any depth; none of them matches `upsample.0.out_layers` or `decode_head`.
    unfreeze_output_layers: train all parameters of these layers. They are saved with the adapter, by `get_lora_state_dict` if
        include_trainable is True. What trains is logged (logger "fastlora.model.inject", level INFO).
    Returns `count_parameters(model)`.

    Raises: as `inject_lora` under a LoRAConfig, and InjectionError if include_ffn finds no layer, if there is no output layer, if a given
    name matches none, or if one gets an adapter by another pattern. The model is unchanged then.
    """
    check_hyperparameters(rank, alpha, dropout)
    ranks = dict(rank_pattern or {})
    if isinstance(output_layer_names, str):
        raise ConfigError(
            f"output_layer_names: expected a list of names, got {output_layer_names!r}"
        )
    names = _output_layers(model) if output_layer_names is None else tuple(output_layer_names)
    # Matches full components: `out_layer` is not `upsample.0.out_layers`.
    heads = [re.compile(rf"(.*\.)?{re.escape(name)}(\..*)?") for name in names if name in ranks]
    config = LoRAConfig(
        (*DEFAULT_TARGETS, *(_FFN if include_ffn else ()), *heads),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rank_pattern=ranks,
        alpha_pattern={name: alpha * own / rank for name, own in ranks.items()},
    )
    selected = select_layers(model, config)
    if not selected:
        raise InjectionError(
            f"model: no layer matches {config.target_modules!r}{suggest(model, config)}"
        )
    taken = [path for path, _ in selected.values()]
    for pattern in ranks:
        if not any(config.matches(pattern, path) for path in taken):
            raise InjectionError(
                f"rank_pattern: {pattern!r} matches none of the {len(taken)} adapted layers{nearest_names(pattern, taken)}"
            )
    if include_ffn and not any(config.matches(name, path) for name in _FFN for path in taken):
        raise InjectionError(
            f"include_ffn: no layer matches {', '.join(_FFN)}{nearest_names('mlp', _paths(model))}"
        )
    unfrozen = [name for name in names if name not in ranks] if unfreeze_output_layers else []
    trained = parameters_within(model, unfrozen, sorted(taken), "output_layer_names")
    if unfreeze_output_layers and not trained and len(unfrozen) == len(names):
        raise InjectionError(
            f"output_layer_names: the model has no module with parameters that is called "
            f"{' or '.join(names or DEFAULT_OUTPUT_LAYERS)}{nearest_names('head', _paths(model))}; "
            "name its output layers, or pass unfreeze_output_layers=False"
        )
    _wrap(model, selected)
    record_heads(model, trained)
    freeze_base_params(model)
    log.info("output layers that train: %s", ", ".join(head_parameters(model)) or "none")
    return count_parameters(model)


def _paths(model: nn.Module) -> list[str]:
    """The paths of all modules."""
    return [path for path, _ in model.named_modules(remove_duplicate=False)]


def _output_layers(model: nn.Module) -> tuple[str, ...]:
    """Those of the default names of output layers that the model has."""
    last = {path.rpartition(".")[2] for path in _paths(model)}
    return tuple(name for name in DEFAULT_OUTPUT_LAYERS if name in last)


def _wrap(model: nn.Module, selected: Selection) -> int:
    """Replace every selected layer, under all its names, by an adapted layer. Returns their number."""
    projections = attention_projections(model)
    ignores_dropout = [
        path for module, (path, own) in selected.items() if own.dropout and module in projections
    ]
    if ignores_dropout:
        warnings.warn(
            f"dropout has no effect on {', '.join(ignores_dropout)}: nn.MultiheadAttention multiplies by "
            "the merged weight itself",
            FastLoRAWarning,
            stacklevel=3,
        )
    wrapped = {module: wrap(module, own) for module, (_, own) in selected.items()}
    for module, layer in wrapped.items():
        initialise(layer, selected[module][1].init_lora_weights)
        layer.usage.dropout_warned = module in projections
    replace_modules(model, wrapped)
    replace_methods(model)
    return len(wrapped)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace submodules of `model` under all their names, except inside adapted layers."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements and not isinstance(parent, LoRALayer):
                setattr(parent, name, replacements[child])
    install_banks(model, replacements)
