"""Find linear layers and give them adapters; freeze, count and set up a model for fine-tuning."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from fastlora.config import ALL_LINEAR, DEFAULT_TARGETS, LoRAConfig, Targets, layer_index
from fastlora.errors import ConfigError, InjectionError
from fastlora.initialise import initialise
from fastlora.layer import LoRALinear, check_hyperparameters, why_unsuitable

DEFAULT_OUTPUT_LAYERS = ("out_layer",)


def inject_lora(
    model: nn.Module,
    target_modules: Targets | LoRAConfig | None = None,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
) -> int:
    """Wrap the matching linear layers of `model` in `LoRALinear`, in place.

    A target matches a layer when it is contained in any component of the layer's dotted path: `to_qkv` takes
    `blocks.0.attn.to_qkv`, and also the children `to_qkv.shape` and `to_qkv.pose` of a ModuleDict. Pass a `LoRAConfig`
    for exact names, globs, regular expressions, exclusions and ranks by layer.

    model: changed only if everything can be wrapped. A module that the model holds under several names is wrapped once
        and stays shared.
    target_modules: patterns, "all-linear", a callback `(path, module) -> bool | LoRAConfig`, or a `LoRAConfig`, which then
        also holds rank, alpha and dropout. None means to_qkv, to_q, to_kv, to_out.
    rank, alpha, dropout: as in `LoRALinear`.
    Returns the number of layers wrapped. If nothing matches, warns and returns 0; under a LoRAConfig that raises.

    Raises: ConfigError for a bad value. InjectionError if the model already has adapters, if a matching layer cannot be
    adapted, or if a pattern of a LoRAConfig matches nothing; the message names the nearest names there are.
    """
    strict = isinstance(target_modules, LoRAConfig)
    if isinstance(target_modules, LoRAConfig):
        if (rank, alpha, dropout) != (4, 8.0, 0.0):
            raise ConfigError("rank, alpha, dropout: give them in the LoRAConfig, not beside it")
        config = target_modules
    else:
        targets = DEFAULT_TARGETS if target_modules is None else target_modules
        config = LoRAConfig(targets, rank=rank, alpha=alpha, dropout=dropout)
    plan = _plan(model, config)
    if strict:
        _check_every_pattern_matched(model, config, plan)
    elif not plan:
        warnings.warn(
            f"inject_lora: no linear layer matches {target_modules or DEFAULT_TARGETS!r}; nothing was changed. "
            f"{_suggest(config, model)}",
            stacklevel=2,
        )
    wrapped = {
        linear: LoRALinear(
            linear,
            chosen.rank,
            chosen.alpha,
            chosen.dropout,
            adapter_dtype=chosen.adapter_dtype,
            backend=chosen.backend,
            use_rslora=chosen.use_rslora,
        )
        for linear, (_, chosen) in plan.items()
    }
    for linear, layer in wrapped.items():
        initialise(layer, plan[linear][1].init_lora_weights)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if (
                isinstance(child, nn.Linear)
                and child in wrapped
                and not isinstance(parent, LoRALinear)
            ):
                setattr(parent, name, wrapped[child])
    return len(wrapped)


def freeze_base_params(model: nn.Module) -> tuple[int, int]:
    """Let only lora_A and lora_B train. Returns (frozen, trainable), counted in parameters (elements)."""
    adapters = {id(parameter) for parameter in get_lora_params(model)}
    if not adapters:
        warnings.warn(
            "freeze_base_params: the model has no LoRALinear; all is frozen", stacklevel=2
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)
    counts = count_parameters(model)
    return counts["total"] - counts["trainable"], counts["trainable"]


def get_lora_params(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A and lora_B of the model, each once, in module order."""
    return [p for _, layer in named_lora_layers(model) for p in (layer.lora_A, layer.lora_B)]


def named_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path, layer) of every LoRALinear, each once under its first name."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "trainable", "lora"}: numbers of elements; a shared parameter counts once."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "lora": sum(p.numel() for p in get_lora_params(model)),
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
) -> dict[str, int]:
    """Inject adapters into the attention projections, freeze the rest, and let the output layer train.

    include_ffn: also adapt the layers under a component that contains `mlp`.
    output_layer_names: whole path components, default ("out_layer",): `out_layer` does not take `upsample.0.out_layers`.
    unfreeze_output_layers: train all parameters of the layers so named. They are then part of
        `get_lora_state_dict(model, include_trainable=True)`.
    Returns `count_parameters(model)`.

    Raises: as `inject_lora` under a LoRAConfig, and InjectionError if an output layer's name matches nothing or is a
    layer that gets an adapter. The model is unchanged then.
    """
    check_hyperparameters(rank, alpha, dropout)
    targets = (*DEFAULT_TARGETS, "mlp") if include_ffn else DEFAULT_TARGETS
    config = LoRAConfig(targets, rank=rank, alpha=alpha, dropout=dropout)
    plan = _plan(model, config)
    if not plan:
        raise InjectionError(
            f"model: no linear layer matches {targets!r}. {_suggest(config, model)}"
        )
    heads: list[nn.Parameter] = []
    if unfreeze_output_layers:
        names = DEFAULT_OUTPUT_LAYERS if output_layer_names is None else tuple(output_layer_names)
        heads = _output_parameters(model, names, {path for path, _ in plan.values()})
    inject_lora(model, targets, rank, alpha, dropout)
    freeze_base_params(model)
    for parameter in heads:
        parameter.requires_grad_(True)
    return count_parameters(model)


def _plan(model: nn.Module, config: LoRAConfig) -> dict[nn.Linear, tuple[str, LoRAConfig]]:
    """The layers to wrap, each with its path and the config whose rank, alpha and dropout it gets. Changes nothing."""
    if isinstance(model, nn.Linear):
        raise InjectionError("model: is itself a linear layer; use LoRALinear(model, rank, alpha)")
    existing = [path or "the model itself" for path, _ in named_lora_layers(model)]
    if existing:
        raise InjectionError(
            f"model: already has {len(existing)} LoRALinear layers (first: {existing[0]}); "
            "merge them before injecting again"
        )
    head = output_embeddings(model) if ALL_LINEAR in config.targets else None
    plan: dict[nn.Linear, tuple[str, LoRAConfig]] = {}
    for path, module in _linears(model):
        # A layer under several names is taken if any of them matches, as the first that does.
        if module in plan or not config.takes_index(path):
            continue
        if any(config.matches(pattern, path) for pattern in config.exclude):
            continue
        chosen = _select(config, path, module, head)
        if chosen is not None:
            plan[module] = path, chosen
    problems = [(path, why_unsuitable(linear)) for linear, (path, _) in plan.items()]
    refused = [f"{path}: {reason}" for path, reason in problems if reason is not None]
    if refused:
        raise InjectionError("cannot adapt " + "; ".join(refused))
    return plan


def _select(
    config: LoRAConfig, path: str, module: nn.Linear, head: nn.Module | None
) -> LoRAConfig | None:
    if callable(config.target_modules):
        answer = config.target_modules(path, module)
        if not isinstance(answer, (bool, LoRAConfig)):
            raise ConfigError(
                f"target_modules: the callback must return a bool or a LoRAConfig, got {answer!r} for {path}"
            )
        if answer is False:
            return None
        config = config if answer is True else answer
    elif not any(
        module is not head if pattern == ALL_LINEAR else config.matches(pattern, path)
        for pattern in config.targets
    ):
        return None

    def by_pattern(patterns: Mapping[str, float], default: float) -> float:
        return next(
            (v for pattern, v in patterns.items() if config.matches(pattern, path)), default
        )

    return replace(
        config,
        rank=int(by_pattern(config.rank_pattern, config.rank)),
        alpha=by_pattern(config.alpha_pattern, config.alpha),
        dropout=by_pattern(config.dropout_pattern, config.dropout),
    )


def _check_every_pattern_matched(
    model: nn.Module, config: LoRAConfig, plan: dict[nn.Linear, tuple[str, LoRAConfig]]
) -> None:
    every = [path for path, _ in _linears(model)]
    taken = [path for path, _ in plan.values()]
    for name, patterns, paths in (
        ("target_modules", config.targets, every),
        ("exclude", tuple(config.exclude), every),
        ("rank_pattern", tuple(config.rank_pattern), taken),
        ("alpha_pattern", tuple(config.alpha_pattern), taken),
        ("dropout_pattern", tuple(config.dropout_pattern), taken),
    ):
        for pattern in patterns:
            if pattern != ALL_LINEAR and not any(config.matches(pattern, path) for path in paths):
                shown = pattern.pattern if hasattr(pattern, "pattern") else pattern
                raise InjectionError(
                    f"{name}: {shown!r} matches none of the {len(paths)} "
                    f"{'adapted' if paths is taken else 'linear'} layers. {nearest_names(shown, paths)}"
                )
    numbers = {index for path in taken if (index := layer_index(path)) is not None}
    unused = [i for i in config.indices if i not in numbers]
    if unused:
        raise InjectionError(
            f"layers_to_transform: no adapted layer has the index {unused[0]}; there are {sorted(numbers)}"
        )
    if not plan:
        raise InjectionError(f"target_modules: no layer was selected. {_suggest(config, model)}")


def _output_parameters(
    model: nn.Module, names: Sequence[str], adapted: set[str]
) -> list[nn.Parameter]:
    """The parameters of every module that one of `names` names by a whole path component."""
    found: list[nn.Parameter] = []
    for name in names:
        paths = [path for path, _ in model.named_modules() if name in path.split(".")]
        if not paths:
            components = {c for path, _ in model.named_modules() for c in path.split(".") if c}
            raise InjectionError(
                f"output_layer_names: {name!r} is no module of the model. {nearest_names(name, components)}"
            )
        both = sorted(adapted.intersection(paths))
        if both:
            raise InjectionError(
                f"output_layer_names: {both[0]} would get an adapter and be unfrozen"
            )
        found += [p for path in paths for p in model.get_submodule(path).parameters()]
    return found


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            yield path, module


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output head, where the model follows Hugging Face's convention and names one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _suggest(config: LoRAConfig, model: nn.Module) -> str:
    paths = [path for path, _ in _linears(model)]
    first = next((t for t in config.targets if isinstance(t, str)), "")
    return nearest_names(first, paths)


def nearest_names(wanted: str, paths: Sequence[str] | set[str]) -> str:
    """A hint: the path components most like `wanted`."""
    components = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
    if not components:
        return "There are no such layers in the model."
    close = difflib.get_close_matches(wanted, components, n=3, cutoff=0.4) or components[:5]
    return f"Nearest names: {', '.join(close)}."
