"""Read and load the base model's state dict under the keys that it has without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastlora.io.adapter_file import LoadResult, conflicts, match_keys, raise_or_warn
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import named_lora_layers
from fastlora.layers.dora import DoRALayer
from fastlora.layers.offload import loaded, offload_hook
from fastlora.layers.several import SeveralAdapters
from fastlora.model.frozen import was_frozen
from fastlora.model.heads import remember_base
from fastlora.model.wrappers import plain_key, plain_names


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` with the keys of the model before injection: no adapters, no `original_linear.` or `original_layer.`, and
    no parts of wrappers such as DistributedDataParallel and torch.compile.

    Tensors are detached and share storage; those that accelerate offloads are copied to the CPU. It can be loaded with
    strict=True into the original model. Without adapters it is `model.state_dict()` of the model inside the wrappers.
    """
    state = model.state_dict()
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_meta:
            path, _, name = key.rpartition(".")
            owner = model.get_submodule(path)
            if offload_hook(owner) is not None:
                state[key] = loaded(owner, name).cpu()
    return {original: state[key] for original, key in _key_map(model).items()}


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Any], strict: bool = True
) -> LoadResult:
    """Load weights of the base model, saved without adapters, into a model with adapters, which are kept.

    DoRA's magnitudes that still equal the norms of the old weights are set to those of the new.

    state: keys as in `base_state_dict`. Values are cast and moved as by `load_state_dict`. For a tensor with several keys (tied
        weights, a module under two names) one is enough; if there are several, their values must be equal.
    strict: every key must be present with the right shape, and no unknown key; on failure nothing is changed. False loads
        what fits and warns about the other keys.
    Returns the keys loaded, missing and unexpected, as in `state`.

    Raises: CheckpointError naming each missing, unexpected and wrongly shaped key with the nearest candidate, and also if
    strict is False but nothing would be loaded.
    """
    keys = _key_map(model)
    held = model.state_dict()
    current = {original: held[key] for original, key in keys.items()}
    known = {key: value for key, value in current.items() if isinstance(value, Tensor)}
    state = {plain_key(key, current): value for key, value in state.items()}
    extras = [key for key in current if key not in known]  # from get_extra_state
    names = _names_of_one_tensor(model, keys)
    wanted = [k for k in known if k in state or not any(n in state for n in names.get(k, ()))]
    result, problems = match_keys(
        {key: value for key, value in state.items() if key not in extras}, wanted, known
    )
    groups = {id(group): group for group in names.values()}.values()
    problems += conflicts({key: state[key] for key in result.loaded}, groups)
    absent = [key for key in extras if key not in state]
    problems += [f"missing {key}" for key in absent]
    result.missing.extend(absent)
    result.loaded.extend(key for key in extras if key in state)
    raise_or_warn("state", problems, result.loaded, strict)
    fresh = [m for m in model.modules() if isinstance(m, DoRALayer) and m.scales_nothing()]
    model.load_state_dict({keys[key]: state[key] for key in result.loaded}, strict=False)
    for layer in fresh:
        layer.reset_magnitude()
    if was_frozen(model):
        remember_base(model)
    return result


def _key_map(model: nn.Module) -> dict[str, str]:
    """Key before injection → key now, for everything but the adapters, in the order of the state dict."""
    plain = plain_names(model)
    layers = named_lora_layers(model, remove_duplicate=False)
    adapted = {plain(path): layer for path, layer in layers}
    several = {
        plain(path): module.layers[0]
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SeveralAdapters)
    }
    adapted |= several
    # The weight of a bank is a parameter of the plain model.
    banks = {
        plain(path)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ExpertBank)
    }
    found = {}
    for key in model.state_dict():
        parts = plain(key).split(".")
        at = next((i for i in range(len(parts)) if ".".join(parts[:i]) in several), None)
        if at is not None:
            del parts[at]  # the name of one of the wrappers, which have one wrapped layer
        depth = next((i for i in range(len(parts)) if ".".join(parts[:i]) in adapted), None)
        if ".".join(parts[:-1]) in banks:
            found[".".join(parts[:-1] if depth is None else parts[:depth])] = key
        elif depth is None:
            found[".".join(parts)] = key
        elif parts[depth] == adapted[".".join(parts[:depth])].wrapped_name:
            found[".".join(parts[:depth] + parts[depth + 1 :])] = key
    return found


def _names_of_one_tensor(model: nn.Module, keys: Mapping[str, str]) -> dict[str, list[str]]:
    """For each key before injection whose tensor has several keys: all of them."""
    plain = plain_names(model)
    before = {plain(key): original for original, key in keys.items()}
    owners: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for key, tensor in named(remove_duplicate=False):
            key = plain(key)
            if key in before:
                owners.setdefault(id(tensor), []).append(before[key])
    return {key: group for group in owners.values() if len(group) > 1 for key in group}
