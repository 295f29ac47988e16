"""`DeferredTensor`: a tensor whose value is computed when an operation first needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_iter, tree_map_only

from fastlora.errors import MergeError
from fastlora.ops.dispatch import functorch_active
from fastlora.ops.linear import exact_gradients

Tensors = Sequence[Tensor | None]


class Recipe:
    """How a value is computed, with arguments as in `defer`."""

    def __init__(
        self, compute: Callable[..., Tensor], tensors: Tensors, on_use: Callable[[], None]
    ) -> None:
        self.compute, self.tensors, self.on_use = compute, tensors, on_use
        self._versions, self._places = self._state()

    def value(self) -> Tensor:
        """The value, without gradients. Raises: MergeError if a tensor has changed."""
        self._check(self._state() != (self._versions, self._places))
        with torch.no_grad():
            # Contiguous, as the tensor has said that it is.
            return self.compute(*self.tensors).contiguous()

    def gradients(self, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
        """The gradients of the tensors that `needs` marks, differentiable if gradients are enabled. Raises: as `value`."""
        self._check(self._state()[0] != self._versions)  # a sharded parameter may have moved

        def compute(*tensors: Tensor | None) -> list[Tensor]:
            return [self.compute(*tensors)]

        return exact_gradients(compute, self.tensors, needs, [grad])

    def _state(self) -> tuple[list[int], list[int]]:
        given = [tensor for tensor in self.tensors if tensor is not None]
        return [tensor._version for tensor in given], [tensor.data_ptr() for tensor in given]

    def _check(self, changed: bool) -> None:
        if changed:
            raise MergeError(
                "a merged weight that was read before a change of the base weight or of the adapter is used after it; "
                "read layer.weight again, or keep its value: layer.weight.detach().clone()"
            )


class DeferredTensor(Tensor):
    """A tensor that answers what it is (shape, dtype, device, …) at once, and computes its value when an operation first needs it.

    A wrapper subclass without storage. Operations reach `__torch_dispatch__`, below autograd, whatever code calls them, and get the value;
    their results are plain tensors. `defer` gives the wrapper its place in the graph. C++ code that reads its memory directly
    gets an error from PyTorch.

    Raises: MergeError, in the operation, if it writes into the tensor, or if what the value is computed from has changed since.
    """

    # Subclasses with a `__torch_function__` are excluded from PyTorch's fast paths.
    __torch_function__ = torch._C._disabled_torch_function_impl
    _recipe: Recipe
    _value: Tensor | None

    @staticmethod
    def __new__(cls, recipe: Recipe) -> DeferredTensor:
        like = recipe.tensors[0]
        assert like is not None
        self: DeferredTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
        self._recipe, self._value = recipe, None
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = [given.get(a.name) for a in func._schema.arguments if a.is_write]
            if any(isinstance(leaf, cls) for leaf in tree_iter(written)):
                raise MergeError(
                    f"{func}: the weight of an adapted layer is computed from the base weight and the adapter, so it "
                    "cannot be written; change those, or layer.weight.clone()"
                )
        args, kwargs = tree_map_only(cls, cls._computed, (args, kwargs))
        return func(*args, **kwargs)

    def plain(self) -> Tensor:
        """The same value as a plain tensor, at the same place in the graph."""
        return self.view_as(self)

    def _computed(self) -> Tensor:
        if self._value is None:
            self._recipe.on_use()
            # The value must be usable wherever the tensor is: also outside of an inference mode entered since.
            with torch.inference_mode(self.is_inference()):
                self._value = self._recipe.value()
        return self._value.detach()  # an alias, so that no operation returns the value itself


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *tensors: Tensor | None) -> Tensor:
        ctx.recipe = recipe  # not the tensor, whose value would then live as long as the graph
        return DeferredTensor(recipe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recipe.gradients(ctx.needs_input_grad[1:], grad)


def defer(
    compute: Callable[..., Tensor], tensors: Tensors, on_use: Callable[[], None]
) -> Tensor:
    """compute(*tensors), computed when an operation first needs its value; gradients flow to `tensors`, as if it were computed here.

    compute: a pure function, whose result has the shape, dtype and device of the first tensor. on_use: called when the value is needed.
    """
    recipe = Recipe(compute, tensors, on_use)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result: Tensor = _Deferred.apply(recipe, *tensors)  # type: ignore[no-untyped-call]
        return result
    return DeferredTensor(recipe)


def can_defer(tensors: Tensors) -> bool:
    """Whether `defer` takes these tensors here: plain contiguous ones, outside of tracing, functorch and forward-mode differentiation."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not functorch_active()
        and forward_ad._current_level < 0
        and all(tensor is None or _is_plain(tensor) for tensor in tensors)
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (torch.nn.Parameter, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_inference()  # it has no version
        and tensor.is_contiguous()
    )


def _on_plain(name: str) -> Any:
    def method(self: DeferredTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.plain(), name)(*args, **kwargs)

    method.__name__ = name
    return method


# The methods that read the memory without an operation.
for _name in (
    *("data_ptr", "untyped_storage", "storage", "_typed_storage", "is_shared", "share_memory_"),
    *("numpy", "tolist", "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__", "__repr__"),
):
    setattr(DeferredTensor, _name, _on_plain(_name))
