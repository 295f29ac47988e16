"""Set-up that every test shares."""

import os

import pytest
import torch

# Read when a Triton kernel is decorated, so it must be set before the first import of `fastlora.kernels`.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
