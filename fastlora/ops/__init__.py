"""The LoRA product: reference mathematics, dropout, choice of backend and plan, autograd functions, Triton operators."""
