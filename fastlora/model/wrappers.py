"""Modules that wrap a model (DistributedDataParallel, torch.compile, …): the model inside, and names without the wrappers' parts."""

from __future__ import annotations

from collections.abc import Callable, Container

from torch import nn

# Class of torch → the name of its child. By name, because importing some of them is slow.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
_PRIVATE = {child for child in _WRAPPERS.values() if child.startswith("_")}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers, or the model itself."""
    while (child := _wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """A function that removes the parts of wrappers, anywhere in `model`, from the name of a module, parameter or buffer."""
    prefixes = [
        f"{path}.{child}.".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if (child := _wrapped_child(module)) is not None
    ]
    prefixes.sort(key=len, reverse=True)  # inner ones first, while the outer parts are still there

    def plain(name: str) -> str:
        for prefix in prefixes:
            if f"{name}.".startswith(prefix):
                outer = prefix.removesuffix(".").rpartition(".")[0]
                name = f"{outer}.{name[len(prefix) :]}".strip(".")
        return name

    return plain


def plain_key(key: str, known: Container[str]) -> str:
    """`key` as it is in `known`, if only parts of wrappers, which older files have, differ; otherwise `key`."""
    if key in known:
        return key
    parts = [part for part in key.split(".") if part not in _PRIVATE]
    while len(parts) > 1 and parts[0] == "module" and ".".join(parts) not in known:
        del parts[0]
    plain = ".".join(parts)
    return plain if plain in known else key


def _wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that a wrapper wraps, or None for other modules."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
            return _WRAPPERS[kind.__name__]
    return None
