"""Methods of a transformers model that need the keys and classes of the model without adapters.

`PreTrainedModel.tie_weights`, `resize_token_embeddings` and `save_pretrained` look for `lm_head.weight` and the like by name. `inject_lora` puts
a `Method` in their place on the model itself, and on each such model inside; without adapters it calls the method of the class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from fastlora.errors import InjectionError
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import LoRALayer
from fastlora.layers.several import SeveralAdapters

_ADAPTED = (LoRALayer, SeveralAdapters)


class Method:
    """A method of one model: that of `METHODS` while the model has adapters, otherwise that of its class.

    A copy or an unpickled model gets a `Method` of its own. The reference is weak, so that a model is freed as soon as before.

    Raises: InjectionError if the model was freed between the look-up and the call, as in `build().save_pretrained(…)`.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = weakref.ref(model)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise InjectionError(
                f"{self.name}: the model was freed before the call; keep it in a variable (`model = …; model.{self.name}(…)`)"
            )
        own = any(isinstance(module, LoRALayer) for module in model.modules())
        chosen = METHODS[self.name] if own else getattr(type(model), self.name)
        return chosen(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        model = self._model()
        return Method(cast(nn.Module, memo.get(id(model), model)), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Method, (self._model(), self.name)


def replace_methods(model: nn.Module) -> None:
    """Give every transformers model in `model` the methods of `METHODS`."""
    for module in model.modules():
        if is_pretrained(module):
            for name in METHODS:
                module.__dict__.setdefault(name, Method(module, name))


def restore_methods(model: nn.Module) -> None:
    """Undo `replace_methods`."""
    for module in model.modules():
        for name in METHODS:
            if isinstance(module.__dict__.get(name), Method):
                del module.__dict__[name]


def is_pretrained(module: nn.Module) -> bool:
    """Whether the module is transformers' `PreTrainedModel`, found without importing transformers."""
    known = ("transformers.modeling_utils", "PreTrainedModel")
    return any((base.__module__, base.__name__) == known for base in type(module).__mro__)


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Context manager: the wrapped layers are in the module tree, in the places of the adapted ones, and weights of banks are parameters."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (*_ADAPTED, ExpertBank))
    ]
    for parent, name, layer in places:
        plain = layer if isinstance(layer, ExpertBank) else layer.wrapped
        parent._modules[name] = plain
        if isinstance(plain, ExpertBank):
            del parent._modules[name]
            parent._parameters[name] = plain.weight
    try:
        yield
    finally:
        for parent, name, layer in places:
            parent._parameters.pop(name, None)
            parent._modules[name] = layer


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The weights of wrapped layers are tied as those of plain ones."""
    with plain_layers(model):
        return type(model).tie_weights(model, *args, **kwargs)


def _resize_token_embeddings(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Raises: InjectionError if it would change the size of an adapted layer."""
    given = (new_num_tokens, pad_to_multiple_of)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = [layer for layer in (embeddings, head) if isinstance(layer, _ADAPTED)]
    if not adapted or given == (None, None):
        return type(model).resize_token_embeddings(model, *given, *args, **kwargs)
    now = cast(int, embeddings.weight.shape[0])
    wanted = now if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != now:
        paths = [path for path, module in model.named_modules() if module in adapted]
        raise InjectionError(
            f"resize_token_embeddings: {', '.join(paths)} is adapted for {now} tokens, and its adapter does not fit {wanted}; resize "
            "before inject_lora, or merge the adapter first"
        )
    with plain_layers(model):
        type(model).resize_token_embeddings(model, *given, *args, **kwargs)
    return model.get_input_embeddings()


# `fastlora.peft.whole_model` adds save_pretrained, which writes files.
METHODS: dict[str, Callable[..., Any]] = {
    "tie_weights": _tie_weights,
    "resize_token_embeddings": _resize_token_embeddings,
}
