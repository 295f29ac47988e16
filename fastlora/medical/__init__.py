"""The medical application: data, models, training and evaluation."""

from importlib import import_module
from typing import Any

_HOMES = {
    "MedicalTrainer": "fastlora.medical.training.trainer",
    "TS_SAM3D_Dataset": "fastlora.medical.data.slices",
}


def __getattr__(name: str) -> Any:
    """The application's two classes, imported on first access."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
