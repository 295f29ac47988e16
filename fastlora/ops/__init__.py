"""The LoRA product: reference mathematics, dropout, choice of backend and plan, autograd functions, Triton operators."""

from pathlib import Path

from fastlora.installation import provide_kernels

# Here because the modules of this package are the first to import `fastlora.kernels`.
provide_kernels(Path(__file__).parent.parent)
