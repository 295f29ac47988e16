"""The table of shapes that every implementation of the linear layer is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops import reference
from fastlora.ops.dropout import keep_mask
from fastlora.ops.group import lora_linear_group
from fastlora.ops.linear import low_rank
from fastlora.ops.reference import Layer


@dataclass(frozen=True)
class Case:
    """x has the shape `lead + (k,)`; `strided` makes it a transposed view."""

    lead: tuple[int, ...]
    k: int
    n: int
    rank: int
    p: float = 0.0
    bias: bool = True
    strided: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, (*self.lead, self.k)))
        flags = f"{'-bias' if self.bias else ''}{'-strided' if self.strided else ''}"
        return f"{shape}-n{self.n}-r{self.rank}-p{self.p}{flags}"

    @property
    def m(self) -> int:
        return int(torch.Size(self.lead).numel())

    @property
    def empty(self) -> bool:
        """Whether there is nothing for a kernel to compute."""
        return 0 in (self.m, self.n, self.k)


CASES = [
    Case((1,), 16, 16, 1),
    Case((33,), 24, 40, 8, p=0.1),
    Case((33,), 17, 31, 4, p=0.5, bias=False),
    Case((128,), 64, 96, 16),
    Case((70,), 65, 129, 64, p=0.3),
    Case((2, 5), 32, 48, 8, p=0.1),
    Case((2, 3, 4), 20, 12, 4, bias=False),
    Case((31,), 48, 64, 8, p=0.1, strided=True),
    Case((4, 6), 48, 64, 8, strided=True),
    Case((), 16, 24, 4, p=0.2),
    Case((0,), 16, 24, 4, p=0.1),
    Case((2, 0), 16, 24, 4),
    Case((2, 3), 16, 0, 4, p=0.1),
    Case((2, 3), 0, 24, 4, p=0.1),
]


@dataclass
class Tensors:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    scaling: float = 1.75

    def to(self, dtype: torch.dtype) -> Tensors:
        """The same values (representable in every 16-bit dtype) and strides in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Tensors(
            self.x.to(dtype),
            self.weight.to(dtype),
            bias,
            self.lora_a.to(dtype),
            self.lora_b.to(dtype),
            self.dy.to(dtype),
            self.scaling,
        )


def make(case: Case, seed: int = 0) -> Tensors:
    """float32 inputs of the case, rounded to values that bfloat16 and float16 represent exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    if case.strided:
        x = draw(case.k, *case.lead).movedim(0, -1)
        dy = draw(case.n, *case.lead).movedim(0, -1)
    else:
        x, dy = draw(*case.lead, case.k), draw(*case.lead, case.n)
    bias = draw(case.n) if case.bias else None
    return Tensors(
        x, draw(case.n, case.k), bias, draw(case.rank, case.k), draw(case.n, case.rank), dy
    )


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    *,
    triton: bool = False,
) -> Tensor:
    """The result of `lora_linear` by the reference under autograd with the mask of that call. triton: whether the call runs kernels."""
    rows = x.reshape(torch.Size(x.shape[:-1]).numel(), x.shape[-1])
    low = low_rank(lora_a, lora_b, scaling, p, seed)
    y, _ = reference.forward(rows, weight, bias, low, keep_mask(rows, low.p, low.seed, triton))
    return y.reshape(*x.shape[:-1], weight.shape[0])


class Member(NamedTuple):
    """The tensors and the scaling of a layer in a group; dropout and seed are those of a call."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def run_group(
    x: Tensor, members: Sequence[Member], p: float, seed: Tensor | None, **settings: Any
) -> list[Tensor]:
    """`lora_linear_group` of the members, all with one p and one seed."""
    layers = [
        Layer(m.weight, m.bias, low_rank(m.lora_a, m.lora_b, m.scaling, p, seed)) for m in members
    ]
    return lora_linear_group(x, layers, **settings)
