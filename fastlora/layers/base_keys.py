"""Keys of the model before injection, in `load_state_dict` of an adapted layer."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any


class _MissingAdapter(str):
    """A missing key. torch formats it in the error of strict=True, where it names the remedy; strict=False returns it as it is."""

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s} (the state has no adapters: fastlora.load_base_state_dict(model, state) loads one of the base model, and "
            "keeps the adapters)"
        )


def add_wrapped_name(state: dict[str, Any], prefix: str, wrapped: str, own: Set[str]) -> bool:
    """Rename, in place, the keys of the layer at `prefix` that it had before injection. Returns whether there were any.

    wrapped: the attribute with the wrapped layer. own: the names that the layer itself has in a state.
    """
    old = [
        key
        for key in state
        if key.startswith(prefix)
        and key[len(prefix) :].partition(".")[0] not in own | {"_extra_state"}
    ]
    for key in old:
        new = f"{prefix}{wrapped}.{key[len(prefix) :]}"
        if new not in state:
            state[new] = state.pop(key)
    return bool(old)


def name_remedy(missing: list[str], adapter: Sequence[str]) -> None:
    """Add the remedy to the first missing key, if all keys of the adapter of the layer are missing."""
    if set(adapter) <= set(missing) and not any(isinstance(k, _MissingAdapter) for k in missing):
        first = missing.index(adapter[0])
        missing[first] = _MissingAdapter(missing[first])
