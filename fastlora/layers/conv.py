"""`LoRAConv`: a frozen convolution with a trainable low-rank update."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.errors import ConfigError
from fastlora.layers.base import LoRALayer, Shape, wrapped_attribute
from fastlora.layers.quantised import why_not_computable
from fastlora.layers.usage import note_compiled_call

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoRAConv(LoRALayer):
    """y = conv(x, W) + bias + scaling · conv₁(conv(dropout(x), A), B) around an `nn.Conv1d`, `Conv2d` or `Conv3d`.

    `lora_A` (rank, in_channels / groups, *kernel_size) has the stride, padding, padding mode, dilation and groups of the wrapped
    layer, `lora_B` (out_channels, rank / groups, 1, …) is pointwise; each group has an equal part of the rank. So ΔW is an
    update of W and can be merged, unlike PEFT's with groups, dilation or a padding mode. The wrapped layer is `original_layer`. Plain torch
    operations, on every device.

    Arguments as in `LoRALinear`; the rank must be a multiple of groups.

    Raises: ConfigError for an invalid value, BackendError for backend="triton", InjectionError if the layer cannot be adapted: a
    transposed or lazy convolution, or a subclass with a custom forward.
    """

    wrapped_name = "original_layer"
    operations = "a convolution: three convolutions of torch"
    kind = "conv"
    original_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d
    in_channels = wrapped_attribute("in_channels")
    out_channels = wrapped_attribute("out_channels")
    kernel_size = wrapped_attribute("kernel_size")
    stride = wrapped_attribute("stride")
    padding = wrapped_attribute("padding")
    padding_mode = wrapped_attribute("padding_mode")
    dilation = wrapped_attribute("dilation")
    groups = wrapped_attribute("groups")

    @classmethod
    def why_unsuitable(cls, layer: object) -> str | None:
        kind = type(layer).__name__
        if not isinstance(layer, CONVOLUTIONS):
            return f"expected an nn.Conv1d, Conv2d or Conv3d, got {kind}"
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            return f"{kind} has no weight yet (lazy): run one forward pass first"
        own = next(k for k in CONVOLUTIONS if isinstance(layer, k))
        if type(layer).forward is not own.forward or (
            type(layer)._conv_forward is not own._conv_forward
        ):
            return f"{kind} has a custom forward, which the update would not match"
        return why_not_computable(layer)

    @staticmethod
    def factor_shapes(original: nn.Module, rank: int) -> tuple[Shape, Shape]:
        conv = cast(nn.Conv2d, original)
        if rank % conv.groups:
            raise ConfigError(f"rank: expected a multiple of groups={conv.groups}, got {rank}")
        ones = (1,) * len(conv.kernel_size)
        inside = (rank, conv.in_channels // conv.groups, *conv.kernel_size)
        return inside, (conv.out_channels, rank // conv.groups, *ones)

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, in_channels, *size) or without B. Returns (B, out_channels, *size after the convolution)."""
        if torch.compiler.is_compiling():
            note_compiled_call(self.lora_A)
        else:
            self.usage.called = True
        y = self.original_layer(input)
        if self.disabled:
            return cast(Tensor, y)
        return self._update(y, input.to(y.device))  # accelerate's hooks may move its input

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output for x, where y is the output of the wrapped layer, on y's device."""
        conv = self.original_layer
        a, b = (factor.to(x.dtype) for factor in self.factors_on(y.device))
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        s = conv._conv_forward(x, a, None)
        update = _POINTWISE[len(conv.kernel_size)](s, b, groups=conv.groups)
        return y + self.scaling * update

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self.original_layer._conv_forward(x, weight, bias))

    def sample_input(self, rows: int, generator: torch.Generator) -> Tensor:
        conv = self.original_layer
        # The span of the kernel plus one, but at least what a reflecting padding needs.
        spans = zip(conv.kernel_size, conv.dilation, _paddings(conv), strict=True)
        size = [max(d * (k - 1) + 2, p + 1) for k, d, p in spans]
        return torch.randn(rows, conv.in_channels, *size, generator=generator)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", bias={self.bias is not None}"

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        conv = self.original_layer
        groups = conv.groups
        a = a.reshape(groups, a.shape[0] // groups, -1)  # [G, R/G, C/G·k]
        b = b.reshape(groups, conv.out_channels // groups, -1)  # [G, N/G, R/G]
        return (b @ a).reshape(conv.weight.shape)


def _paddings(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    if isinstance(conv.padding, str):
        return tuple(d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return tuple(conv.padding)
