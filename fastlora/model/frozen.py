"""What `freeze_base_params` froze: samples of its values, which tell later whether it changed.

A frozen parameter changes if it was unfrozen, trained and frozen again, or if its module was replaced; a running mean changes in each
forward pass in training mode. Neither is saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.model.sharded import is_flattened

# Attribute of a module: name → sample, of the tensors of the module (`weight`) and of its direct children (`norm.weight`); None for one
# without plain values. A conversion such as `SyncBatchNorm.convert_sync_batchnorm` replaces a child by one with the same tensors.
_SAMPLES = "_fastlora_frozen"
_SIZE = 64  # values in a sample, at most
# Relative. A moving average of equal values drifts by 1e-4, and training changes more.
_TOLERANCE = 1e-3


def nearby_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the module and of its direct children."""
    for prefix, owner in _nearby(module):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter


def nearby_named(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that were the parameter `name` of the module or of a direct child: itself, or those that it is computed from since.

    Empty if there is none any more.
    """
    child, _, name = name.rpartition(".")
    owner = module._modules.get(child) if child else module
    if owner is None:
        return []
    parameter = owner._parameters.get(name)
    if parameter is not None:
        return [parameter]
    if parametrize.is_parametrized(owner, name):
        return list(owner.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    made = owner._parameters.items()  # by torch.nn.utils.weight_norm and spectral_norm
    return [p for key, p in made if p is not None and key.startswith(f"{name}_")]


def was_frozen(model: nn.Module) -> bool:
    """Whether `remember_frozen` was called, and `forget_frozen` was not."""
    return any(_SAMPLES in module.__dict__ for module in model.modules())


def remember_frozen(model: nn.Module, without: Container[int]) -> None:
    """Remember samples of all parameters and running means, except tensors with these ids. Loading a state dict renews them."""
    known: dict[int, _Sample | None] = {}
    for module in model.modules():
        samples = {}
        for name, tensor in _values(module):
            if id(tensor) not in without:
                if id(tensor) not in known:
                    known[id(tensor)] = _sample(tensor)
                samples[name] = known[id(tensor)]
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
        for name, tensor in _values(module):
            now = None if id(tensor) in without else _sample(tensor)
            if now is None:
                continue
            if samples is not None and name in samples:
                before = samples[name]
                if before is None or now.equals(before):
                    same.add(id(tensor))
            names.setdefault(id(tensor), place + name)
    return [name for tensor, name in names.items() if tensor not in same]


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


class _Sample(NamedTuple):
    """Values of a tensor, evenly spaced, on the CPU."""

    shape: torch.Size
    values: Tensor

    def equals(self, before: _Sample) -> bool:
        """Whether it differs from an earlier one by no more than a conversion to another dtype, and back, explains."""
        now = self.values.double()
        return self.shape == before.shape and any(
            torch.allclose(
                now,
                before.values.to(dtype).double(),
                rtol=_TOLERANCE,
                atol=0.0,
                equal_nan=True,
            )
            for dtype in (before.values.dtype, self.values.dtype, torch.float16, torch.bfloat16)
        )


def _sample(tensor: Tensor) -> _Sample | None:
    """None for a tensor without plain values: on meta, quantised, or sharded, also by FSDP1."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not is_flattened(tensor)
    if not plain or tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() == 1:
        return None
    flat = tensor.detach().reshape(-1)
    if not flat.numel():  # as while DeepSpeed partitions it
        return None
    return _Sample(tensor.shape, flat[:: -(-flat.numel() // _SIZE)].cpu().clone())


def _renew(module: nn.Module, _: Any) -> None:
    """A hook after `load_state_dict`, which may be called on this module alone. What trains is loaded as a part of training."""
    samples = module.__dict__.get(_SAMPLES, {})
    for name, tensor in _values(module):
        if name in samples and not tensor.requires_grad:
            samples[name] = _sample(tensor)
