"""`DeferredTensor`: a tensor whose value is computed when an operation first needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from fastlora.errors import MergeError
from fastlora.ops.dispatch import transformed
from fastlora.ops.linear import exact_gradients, no_autocast

Tensors = Sequence[Tensor | None]

# The methods of a tensor that read its memory without an operation.
_READ_MEMORY = (
    *("__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "_typed_storage", "is_shared"),
    *("const_data_ptr", "data_ptr", "numpy", "share_memory_", "storage", "tolist"),
    *("untyped_storage", "__repr__"),
)


def defer(compute: Callable[..., Tensor], tensors: Tensors, on_use: Callable[[], None]) -> Tensor:
    """compute(*tensors), computed when an operation first needs its value; gradients reach `tensors` as if it were computed here.

    compute: a pure function; its result has the shape, dtype and device of the first tensor. on_use: called when the value is needed.
    tensors: as `can_defer` requires them.
    """
    return _deferred(_Recipe(compute, tensors, on_use))


def defer_refusal(tensors: Tensors, refuse: Callable[[], NoReturn]) -> Tensor:
    """A tensor of the form of the first, in the graph as `defer` would put it; `refuse` raises when an operation needs its value.

    tensors: any, outside of what `is_deferrable_here` excludes.
    """
    return _deferred(_Refusal(_no_value, tensors, refuse))


def can_defer(tensors: Tensors) -> bool:
    """Whether `defer` takes these tensors: plain contiguous ones on one device, where `is_deferrable_here`."""
    return (
        is_deferrable_here()
        and all(tensor is None or _is_plain(tensor) for tensor in tensors)
        and len({tensor.device for tensor in tensors if tensor is not None}) == 1
    )


def is_deferrable_here() -> bool:
    """Whether operations run as they are called: outside of compiling, tracing, functorch and forward-mode differentiation."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not transformed()
    )


def _deferred(recipe: _Recipe) -> Tensor:
    tensors = recipe.tensors
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result: Tensor = _Deferred.apply(recipe, *tensors)  # type: ignore[no-untyped-call]
        return result
    return DeferredTensor(recipe)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_inference()  # which has no version
        and tensor.is_contiguous()
    )


class DeferredTensor(Tensor):
    """A tensor that tells its shape, dtype and device at once, and computes its value when an operation first needs it.

    It is a wrapper subclass without storage, and `defer` gives it its place in the graph. Whatever code calls an operation, it
    reaches `__torch_dispatch__`, below autograd, and gets the value; the result is a plain tensor. C++ code that reads the memory
    directly gets PyTorch's error that there is none.

    Raises: MergeError in an operation that writes the tensor, or that needs its value after a tensor that it is computed from changed.
    """

    # With a `__torch_function__`, PyTorch's modules would avoid their fast paths.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _recipe: _Recipe
    _value: Tensor | None

    @staticmethod
    def __new__(cls, recipe: _Recipe) -> DeferredTensor:
        like = recipe.tensors[0]
        assert like is not None
        self: DeferredTensor = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
        torch._C._set_throw_on_mutable_data_ptr(self)  # instead of giving out a null pointer
        self._recipe, self._value = recipe, None
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if schema.is_mutable:
            names = [argument.name for argument in schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            written = [
                given.get(argument.name) for argument in schema.arguments if argument.is_write
            ]
            if any(isinstance(leaf, cls) for leaf in tree_iter(written)):
                raise _not_writable()
        args, kwargs = tree_map_only(cls, cls._computed, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _not_writable()

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _not_writable()

    def _computed(self) -> Tensor:
        if self._value is None:
            self._recipe.on_use()
            # An inference mode that was entered since must not make it an inference tensor.
            with torch.inference_mode(self.is_inference()):
                self._value = self._recipe.value()
        return self._value.detach()  # an alias, so that no operation returns the value itself


class _Recipe:
    """How a value is computed; arguments as in `defer`."""

    def __init__(
        self, compute: Callable[..., Tensor], tensors: Tensors, on_use: Callable[[], None]
    ) -> None:
        self.compute, self.tensors, self.on_use = compute, tensors, on_use
        self._versions, self._places = self._state()

    def value(self) -> Tensor:
        """The value, without a graph. Raises: MergeError if a tensor has changed."""
        self._check(self._state() == (self._versions, self._places))
        with torch.no_grad():
            return self.compute(*self.tensors).contiguous()  # as the wrapper has told

    def gradients(self, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
        """The gradients of the tensors that `needs` marks, differentiable if gradients are enabled. Raises: as `value`."""
        self._check(self._state()[0] == self._versions)  # sharding may have moved them
        with no_autocast(grad):
            return exact_gradients(
                lambda *given: [self.compute(*given)], self.tensors, needs, [grad]
            )

    def _state(self) -> tuple[list[int], list[int]]:
        given = [tensor for tensor in self.tensors if tensor is not None]
        return [tensor._version for tensor in given], [tensor.data_ptr() for tensor in given]

    def _check(self, unchanged: bool) -> None:
        if not unchanged:
            raise MergeError(
                "the weight of an adapted layer was read, then the base weight or the adapter changed, then the weight was "
                "used; read layer.weight again, or keep its value: layer.weight.detach().clone()"
            )


class _Refusal(_Recipe):
    """A value that is refused, so changes of its tensors do not matter. An inference tensor could not tell them."""

    def _state(self) -> tuple[list[int], list[int]]:
        return [], []


def _no_value(*tensors: Tensor | None) -> Tensor:
    raise AssertionError("a refused value was computed")


class _Deferred(torch.autograd.Function):
    """A `DeferredTensor` as a function of the tensors that it is computed from."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *tensors: Tensor | None) -> Tensor:
        ctx.recipe = recipe  # which does not keep the value alive as long as the graph
        return DeferredTensor(recipe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.recipe.gradients
        if torch.compiler.is_compiling():  # compiled autograd, which would lose them
            gradients = torch.compiler.disable(gradients)  # type: ignore[no-untyped-call]
        return None, *gradients(ctx.needs_input_grad[1:], grad)


def _not_writable() -> MergeError:
    return MergeError(
        "the weight of an adapted layer is computed from the base weight and the adapter and cannot be written; "
        "write one of these, or a copy: layer.weight.clone()"
    )


def _on_plain(name: str) -> Callable[..., Any]:
    """The method `name` of a plain tensor with the same value at the same place in the graph."""

    def method(self: DeferredTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.view_as(self), name)(*args, **kwargs)

    return method


for _name in _READ_MEMORY:
    setattr(DeferredTensor, _name, _on_plain(_name))
