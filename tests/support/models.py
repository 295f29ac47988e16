"""Small models whose layer names are those of SAM 3D Objects."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.to_out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return self.mlp(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = FeedForward(width)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """`blocks.N.attn.to_qkv`, `.attn.to_out`, `blocks.N.mlp.mlp.0 / .2`, `input_layer`, `out_layer`, `upsample.0.out_layers`."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.input_layer = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.upsample = nn.ModuleList([nn.ModuleDict({"out_layers": nn.Linear(width, width)})])
        self.out_layer = nn.Linear(width, 5)

    def forward(self, x):
        x = self.input_layer(x)
        for block in self.blocks:
            x = block(x)
        return self.out_layer(self.upsample[0]["out_layers"](x))


class MixtureOfTransformers(nn.Module):
    """Stage 1 of SAM 3D: `self_attn.to_qkv` is a ModuleDict, and its children have the weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        for name, out in (("to_qkv", 3 * width), ("to_out", width)):
            projections = {key: nn.Linear(width, out) for key in ("shape", "pose")}
            setattr(self.self_attn, name, nn.ModuleDict(projections))


class Tokens:
    """The interface of SAM 3D's SparseTensor that a linear layer uses."""

    def __init__(self, feats):
        self.feats = feats

    def replace(self, feats):
        return Tokens(feats)


class TokenLinear(nn.Linear):
    """Takes and returns token objects, as SAM 3D's SparseLinear."""

    def forward(self, input):
        return input.replace(super().forward(input.feats))


class Reader(nn.Module):
    """Calls one layer and multiplies by the weight of another, as a fused projection does."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def randomise_adapters(model: nn.Module, seed: int = 1) -> None:
    """Set what is zero initially, lora_B or an embedding's lora_A, to random values, so that the adapters have an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            starts_at_zero = name.endswith("lora_A") and not parameter.any()
            if name.endswith("lora_B") or starts_at_zero:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
