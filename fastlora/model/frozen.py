"""What `freeze_base_params` froze: samples of its values, which tell later whether it changed.

A frozen parameter changes if it was unfrozen, trained and frozen again, or if its module was replaced; a running mean changes in each
forward pass in training mode. Neither is saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.model.sharded import is_flattened

# Attribute of a module: name → sample, of the tensors of the module (`weight`) and of its direct children (`norm.weight`); None for one
# without plain values. The parent's is for a child that has none of its own: a conversion such as `SyncBatchNorm.convert_sync_batchnorm`
# replaces a child by one with the same tensors. Only plain types, so that a pickle without adapters does not need this package.
_SAMPLES = "_fastlora_frozen"
_Sample = tuple[tuple[int, ...], Tensor]  # shape; evenly spaced values, on the CPU
_SIZE = 64  # values in a sample, at most
_TOLERANCE = 1e-4  # relative; a moving average of equal values drifts by less


def nearby_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the module and of its direct children."""
    for _, name, tensor in _values(module):
        if isinstance(tensor, nn.Parameter):
            yield name, tensor


def nearby_named(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that were the parameter `name` of the module or of a direct child: itself, or those that it is computed from since.

    Empty if there is none any more.
    """
    owner = owner_of(module, name)
    if owner is None:
        return []
    name = name.rpartition(".")[2]
    parameters = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
    if name in parameters:
        return [parameters[name]]
    if parametrize.is_parametrized(owner, name):
        return list(owner.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    # What torch.nn.utils.weight_norm and spectral_norm make of it.
    return [p for key, p in parameters.items() if key.startswith(f"{name}_")]


def was_frozen(model: nn.Module) -> bool:
    """Whether `remember_frozen` was called for the model or a part, and `forget_frozen` was not."""
    return any(has_samples(module) for module in model.modules())


def remember_frozen(model: nn.Module, without: Container[int], *, unknown: bool = False) -> None:
    """Remember samples of all parameters and running means, except tensors with these ids.

    unknown: only of those that had no values at the last call, as on the meta device.
    """
    new: dict[int, _Sample | None] = {}
    for module in model.modules():
        old = module.__dict__.get(_SAMPLES, {}) if unknown else {}
        samples = {name: sample for name, sample in old.items() if sample is not None}
        for _, name, tensor in _values(module):
            if name not in samples and id(tensor) not in without and (name in old or not unknown):
                if id(tensor) not in new:
                    new[id(tensor)] = _sample(tensor)
                samples[name] = new[id(tensor)]
        if not unknown or _SAMPLES in module.__dict__:
            module.__dict__[_SAMPLES] = samples


def forget_frozen(model: nn.Module) -> None:
    """Remove the samples."""
    for module in model.modules():
        module.__dict__.pop(_SAMPLES, None)


def changed_since_frozen(model: nn.Module, without: Container[int]) -> list[str]:
    """Names of the parameters and running means that changed or were added since `remember_frozen`, except tensors with these ids."""
    names: dict[int, str] = {}
    same: set[int] = set()
    frozen: tuple[str, ...] = ()
    for path, module in model.named_modules():
        place = f"{path}.".lstrip(".")
        samples = module.__dict__.get(_SAMPLES)
        if samples is not None and not place.startswith(frozen):
            frozen += (place,)
        if samples is None and not place.startswith(frozen):
            continue  # outside of what was frozen
        for owner, name, tensor in _values(module):
            now = None if id(tensor) in without else _sample(tensor)
            if now is None:
                continue
            names.setdefault(id(tensor), place + name)
            known = samples if owner is module or not has_samples(owner) else None
            if known is not None and name in known:
                before = known[name]
                if before is None or _equal(now, before):
                    same.add(id(tensor))
    return [name for tensor, name in names.items() if tensor not in same]


def has_samples(module: nn.Module) -> bool:
    """Whether `remember_frozen` was called with this module in the model."""
    return _SAMPLES in module.__dict__


def owner_of(module: nn.Module, name: str) -> nn.Module | None:
    """The module itself for `bias`, its child for `norm.bias`; None if it has no such child (any more)."""
    child = name.rpartition(".")[0]
    return dict(_nearby(module)).get(f"{child}." if child else "")


def _nearby(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "", module
    for name, child in module._modules.items():
        if child is not None:
            yield f"{name}.", child


def _values(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of the parameters and running means of the module and of its direct children."""
    for prefix, owner in _nearby(module):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield owner, prefix + name, parameter
        for name, buffer in owner.named_buffers(recurse=False):
            if name == "running_mean" and name not in owner._non_persistent_buffers_set:
                yield owner, prefix + name, buffer


def _equal(now: _Sample, before: _Sample) -> bool:
    """Whether two samples differ by no more than conversions to a narrower dtype, and back, explain."""
    (shape, values), (old_shape, old) = now, before
    rtol, atol = _TOLERANCE, 0.0
    for dtype in (torch.float16, torch.bfloat16):
        if _fits(values, dtype) and not _fits(old, dtype):
            limits = torch.finfo(dtype)
            rtol, atol = max(rtol, limits.eps), max(atol, limits.tiny * limits.eps)
    return shape == old_shape and torch.allclose(
        values.double(), old.double(), rtol=rtol, atol=atol, equal_nan=True
    )


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).double(), values.double())


def _sample(tensor: Tensor) -> _Sample | None:
    """None for a tensor without plain values: on meta, lazy, sparse, quantised, or sharded, also by FSDP1."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or is_flattened(tensor):
        return None
    value = tensor.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point() or value.element_size() == 1 or not value.numel():
        return None  # DeepSpeed leaves no elements while it partitions a tensor
    step = -(-value.numel() // _SIZE)
    while math.gcd(step, value.shape[-1] if value.ndim else 1) > 1:
        step += 1  # so that not all values are of one column
    return tuple(value.shape), value.reshape(-1)[::step].cpu().clone()
