"""What `freeze_base_params` froze: samples of its values, which tell later whether it changed.

A frozen parameter changes if it was unfrozen, trained and frozen again, or if its module was replaced; a running mean changes in each
forward pass in training mode. Neither is saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Attribute of a module: name → sample, of the tensors of the module (`weight`) and of its direct children (`norm.weight`). A conversion
# such as `SyncBatchNorm.convert_sync_batchnorm` replaces a child by one with the same tensors.
_SAMPLES = "_fastlora_frozen"
_SIZE = 64  # values in a sample, at most
_TOLERANCE = (
    1e-3  # relative: a moving average of equal values drifts by 1e-4, training changes more
)


def nearby_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the module and of its direct children."""
    for prefix, owner in _nearby(module):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter


def nearby_tensor(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer `name` of the module or of a direct child; None if there is none (any more)."""
    child, _, name = name.rpartition(".")
    owner = module._modules.get(child) if child else module
    if owner is None:
        return None
    parameter = owner._parameters.get(name)
    return owner._buffers.get(name) if parameter is None else parameter


def was_frozen(model: nn.Module) -> bool:
    """Whether `remember_frozen` was called, and `forget_frozen` was not."""
    return any(_SAMPLES in module.__dict__ for module in model.modules())


def remember_frozen(model: nn.Module, without: Container[int]) -> None:
    """Remember samples of all parameters and running means, except tensors with these ids. Loading a state dict renews them."""
    known: dict[int, Tensor | None] = {}
    for module in model.modules():
        samples = {}
        for name, tensor in _values(module):
            if id(tensor) not in without:
                sample = known[id(tensor)] = known.get(id(tensor), _sample(tensor))
                if sample is not None:
                    samples[name] = sample
        if _SAMPLES not in module.__dict__:
            module.register_load_state_dict_post_hook(_renew)  # type: ignore[no-untyped-call]
        module.__dict__[_SAMPLES] = samples


def forget_frozen(model: nn.Module) -> None:
    """Remove the samples."""
    for module in model.modules():
        hooks = module._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _renew]:
            del hooks[key]
        module.__dict__.pop(_SAMPLES, None)


def changed_since_frozen(model: nn.Module, without: Container[int]) -> list[str]:
    """Names of the parameters and running means that changed since `remember_frozen`, except tensors with these ids."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, before in module.__dict__.get(_SAMPLES, {}).items():
            tensor = nearby_tensor(module, name)
            if tensor is None or id(tensor) in without or id(tensor) in names:
                continue
            now = _sample(tensor)
            if now is not None and now.shape == before.shape and _differ(now, before):
                names[id(tensor)] = f"{path}.{name}".lstrip(".")
    return list(names.values())


def _nearby(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "", module
    for name, child in module._modules.items():
        if child is not None:
            yield f"{name}.", child


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from nearby_parameters(module)
    for prefix, owner in _nearby(module):
        mean = owner._buffers.get("running_mean")
        if mean is not None:
            yield f"{prefix}running_mean", mean


def _sample(tensor: Tensor) -> Tensor | None:
    """Values of a tensor, evenly spaced, on the CPU; None for one without plain values (on meta, sharded, quantised)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    if not plain or not tensor.is_floating_point() or tensor.element_size() == 1:
        return None
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _SIZE))].cpu().clone()


def _differ(now: Tensor, before: Tensor) -> bool:
    """Whether two samples differ by more than a conversion to another dtype, and back, explains."""
    wide = now.double()
    return not any(
        torch.allclose(wide, before.to(dtype).double(), rtol=_TOLERANCE, atol=0.0, equal_nan=True)
        for dtype in (before.dtype, now.dtype, torch.float16, torch.bfloat16)
    )


def _renew(module: nn.Module, _: Any) -> None:
    """A hook after `load_state_dict`, which may be called on this module alone."""
    samples = module.__dict__.get(_SAMPLES, {})
    for name in samples:
        tensor = nearby_tensor(module, name)
        sample = None if tensor is None else _sample(tensor)
        if sample is not None:
            samples[name] = sample
