"""The exceptions and warnings of fastlora: one small tree, so that a caller can catch all of it or one kind."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastLoRAError(Exception):
    """Base of every error that fastlora raises on purpose."""


class ConfigError(FastLoRAError, ValueError):
    """An argument or a configuration field has a value that cannot work."""


class InjectionError(FastLoRAError, ValueError):
    """A model cannot be given adapters as asked (nothing matched, a layer is unsuitable)."""


class CheckpointError(FastLoRAError, RuntimeError):
    """A state dict or a file does not fit the model, or cannot be read."""


class MergeError(FastLoRAError, RuntimeError):
    """Adapters cannot be folded into the base weights without being wrong."""


class CheckError(FastLoRAError, RuntimeError):
    """`check` found adapters that do not work, or could not look."""


class BackendError(FastLoRAError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class DataError(FastLoRAError, ValueError):
    """A dataset, a volume or a mask is missing, unreadable or inconsistent."""


class TrainingError(FastLoRAError, RuntimeError):
    """Training cannot go on (a non-finite loss, a run folder in use)."""


class ExportError(FastLoRAError, RuntimeError):
    """A model cannot be exported as asked (a missing package, an unsuitable example, a file that cannot be written)."""


class FastLoRAWarning(UserWarning):
    """Something that a caller should change; every warning of fastlora is one."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: " (nearest: a, b)", or "" where nothing is like it."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" (nearest: {', '.join(close)})" if close else ""
