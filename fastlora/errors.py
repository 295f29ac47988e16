"""The exceptions and the warning of fastlora."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 4  # names in a message


class FastLoRAError(Exception):
    """Base of all errors that fastlora raises."""


class ConfigError(FastLoRAError, ValueError):
    """An argument or a configuration field has an invalid value."""


class InjectionError(FastLoRAError, ValueError):
    """Adapters cannot be injected as requested (nothing matched, a layer is unsuitable)."""


class CheckpointError(FastLoRAError, RuntimeError):
    """A file or a state dict cannot be read or written, or does not fit the model."""


class MergeError(FastLoRAError, RuntimeError):
    """Adapters cannot be merged into the base weights correctly."""


class CheckError(FastLoRAError, RuntimeError):
    """`check` found adapters that do not work, or could not run."""


class BackendError(FastLoRAError, RuntimeError):
    """A backend that was requested by name cannot run."""


class DataError(FastLoRAError, ValueError):
    """A dataset, a volume or a mask is missing, unreadable or inconsistent."""


class TrainingError(FastLoRAError, RuntimeError):
    """Training cannot continue (a non-finite loss, a run folder in use)."""


class ExportError(FastLoRAError, RuntimeError):
    """A model cannot be exported as requested (a missing package, an unsuitable example, a file that cannot be written)."""


class FastLoRAWarning(UserWarning):
    """The category of all warnings of fastlora."""


def first_few(names: Sequence[str]) -> str:
    """A list of names in a message: "a, b, c, d and 3 more"."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: " (nearest: a, b)", or "" if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" (nearest: {', '.join(close)})" if close else ""
