"""A small model of gated MLPs."""

import random

import torch
from torch import nn

from fastlora import LoRAConfig, freeze_base_params, get_lora_params, inject_lora
from tests.support.models import randomise_adapters

K, N = 16, 24


class MLP(nn.Module):
    def __init__(self, act=None, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(K, N, bias=bias)
        self.up_proj = nn.Linear(K, N, bias=bias)
        self.down_proj = nn.Linear(N, K, bias=bias)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self, kind=MLP, blocks=2, **settings):
        super().__init__()
        self.blocks = nn.ModuleList(kind(**settings) for _ in range(blocks))
        self.head = nn.Linear(K, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


X = torch.randn(2, 40, K, generator=torch.Generator().manual_seed(0))
BLOCKS = tuple(
    tuple(f"blocks.{i}.{name}_proj" for name in ("gate", "up", "down")) for i in range(2)
)


def net(kind=MLP, targets="all-linear", *, model=None, **settings):
    torch.manual_seed(0)
    model = Net(kind) if model is None else model
    inject_lora(model, LoRAConfig(targets, rank=3, **settings))
    randomise_adapters(model)
    freeze_base_params(model)
    return model


def step(model, x=X, seed=3):
    """The output and the gradients of x and of the trainable parameters."""
    torch.manual_seed(seed)
    random.seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()  # reentrant checkpointing allows no torch.autograd.grad
    return y, x.grad, *(p.grad for p in get_lora_params(model))
