"""The packaged decoder (`--model compact`): a sparse mesh decoder, built like SAM 3D's `SLatMeshDecoder`.

    tokens at the active cells of a coarse segmentation (8³ cells, each with its image patch)
      → input_layer → N × (attention, MLP), pre-norm → out_layer
      → per token a 4³ patch of distance residuals and a transfer curve (grey value → distance) for its voxels
      → both added to the upsampled coarse segmentation (32³)
      → the surface is moved until each cell is filled to its fraction of the coarse segmentation

The curve lets a token express "brighter than this is inside" for its whole cell: one function of the grey
value, which is learned much faster than 64 separate outputs.

The module names are those of SAM 3D (`blocks.N.attn.to_qkv`, `.attn.to_out`, `blocks.N.mlp.mlp.0` and
`.mlp.mlp.2`, `input_layer`, `out_layer`), and so is the convention that linear layers take and return a token object,
so the same LoRA configuration fits both models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fastlora import setup_lora_for_medical_finetuning
from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.files import atomic_write_all, json_bytes
from fastlora.medical.data.batch import RegionBatch, SparseTokens
from fastlora.medical.models.losses import LOSS_WEIGHTS, mesh_losses
from fastlora.medical.models.trainee import ModelOptions, Trainee

FRACTION_WIDTH_VOX = 0.2
"""Width (fine voxels) of the sigmoid by which a cell's filled fraction is differentiable; much smaller than a voxel, since the coarse
segmentation is a fraction of voxels."""

MIN_SLOPE = 0.02
"""Added to the change of a cell's fraction with the distance (per fine voxel), which is 0 in a cell without surface."""

BASE_WEIGHTS = Path(__file__).with_name("weights") / "base.safetensors"
"""The packaged base, pretrained on procedural shapes without anatomy; its model card `base.json` states how."""


class SparseLinear(nn.Linear):
    """A linear layer from tokens to tokens: `tokens.replace(feats @ Wᵀ + b)`."""

    def forward(self, tokens: SparseTokens) -> SparseTokens:  # type: ignore[override]
        return tokens.replace(F.linear(tokens.feats, self.weight, self.bias))


class SparseGELU(nn.GELU):
    """GELU of the tokens' features."""

    def forward(self, tokens: SparseTokens) -> SparseTokens:  # type: ignore[override]
        return tokens.replace(super().forward(tokens.feats))


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a `SparseMeshDecoder`.

    in_channels: of a token (`regions.TOKEN_CHANNELS`); the first `(cell_size + 2·context)³` are its image patch, grey values
        in [-2, 2], the last 3³ the coarse values around it in [-1, 1]. knots: of the transfer curve, evenly spaced over that range.
    fraction_steps: how often the surface is moved towards the fractions of the coarse segmentation.

    Raises: ConfigError if a number is out of range, or `heads` does not divide `channels`.
    """

    in_channels: int
    channels: int = 128
    blocks: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    coarse_size: int = 8
    cell_size: int = 4
    context: int = 2
    knots: int = 8
    fraction_steps: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"context": 0, "channels": 6, "knots": 2, "fraction_steps": 0}.get(
                field.name, 1
            )
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"DecoderConfig.{field.name}: expected an int >= {least}, got {value!r}"
                )
        needed = self.patch_size**3 + (3**3 if self.fraction_steps else 0)
        if self.in_channels < needed:
            coarse = " and 3³ coarse values" if self.fraction_steps else ""
            raise ConfigError(
                f"DecoderConfig.in_channels: expected at least the image patch's {self.patch_size}³{coarse} = {needed}, "
                f"got {self.in_channels}"
            )
        if self.channels % self.heads:
            raise ConfigError(
                f"DecoderConfig.heads: expected a divisor of channels={self.channels}, got {self.heads}"
            )

    @property
    def patch_size(self) -> int:
        """Edge in voxels of the image patch that a token carries."""
        return self.cell_size + 2 * self.context


@dataclass(frozen=True, eq=False)
class _Layout:
    """Position of each token in a dense (B, L, ·) batch padded to the longest sample."""

    place: tuple[Tensor, ...]  # the token's sample and its slot, (T,) each
    size: tuple[int, int]  # (B, L)
    mask: Tensor | None  # (B, 1, 1, L) bool, True at tokens; None without padding

    @classmethod
    def of(cls, coords: Tensor, batch: int) -> _Layout:
        lengths = torch.bincount(coords[:, 0], minlength=batch)
        longest = int(lengths.max())
        mask = torch.arange(longest, device=coords.device) < lengths[:, None]
        place = mask.nonzero(as_tuple=True)  # tokens are in the order of their samples
        return cls(place, (batch, longest), None if mask.all() else mask[:, None, None])


class SparseAttention(nn.Module):
    """Multi-head self-attention among the tokens of each sample."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: SparseTokens, layout: _Layout) -> SparseTokens:
        batch, longest = layout.size
        feats = self.to_qkv(tokens.feats)  # (T, 3C)
        qkv = feats.new_zeros(batch, longest, feats.shape[1])
        qkv = qkv.index_put(layout.place, feats)  # (B, L, 3C)
        # Explicit sizes, since they cannot be inferred for a batch without tokens, which must still use every weight.
        width = qkv.shape[2] // (3 * self.heads)
        q, k, v = qkv.view(batch, longest, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        # A sample with no tokens has an all-False row here; its output is never gathered.
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask)
        mixed = mixed.transpose(1, 2).reshape(batch, longest, self.heads * width)
        return tokens.replace(self.to_out(mixed[layout.place]))


class SparseFeedForward(nn.Module):
    """Linear, GELU, linear, on each token."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            SparseLinear(channels, ratio * channels),
            SparseGELU(approximate="tanh"),
            SparseLinear(ratio * channels, channels),
        )

    def forward(self, tokens: SparseTokens) -> SparseTokens:
        out: SparseTokens = self.mlp(tokens)
        return out


class SparseBlock(nn.Module):
    """A pre-norm transformer block over sparse tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.channels, elementwise_affine=False)
        self.attn = SparseAttention(config.channels, config.heads)
        self.norm2 = nn.LayerNorm(config.channels, elementwise_affine=False)
        self.mlp = SparseFeedForward(config.channels, config.mlp_ratio)

    def forward(self, tokens: SparseTokens, layout: _Layout) -> SparseTokens:
        mixed = self.attn(tokens.replace(self.norm1(tokens.feats)), layout)
        tokens = tokens.replace(tokens.feats + mixed.feats)
        fed = self.mlp(tokens.replace(self.norm2(tokens.feats)))
        return tokens.replace(tokens.feats + fed.feats)


def position_embedding(cells: Tensor, channels: int) -> Tensor:
    """Sine-cosine embedding (T, channels) of integer cells (T, 3); channels beyond a multiple of 6 are zero."""
    count = channels // 6
    steps = torch.arange(count, dtype=torch.float32, device=cells.device) / count
    angles = cells[:, :, None].float() / 10000.0**steps  # (T, 3, count)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(waves, (0, channels - waves.shape[1]))


class SparseMeshDecoder(Trainee):
    """Coarse segmentation and image patches -> signed distances on the fine grid.

    `out_layer` is initialised to zero: a new decoder returns the upsampled coarse segmentation, and no gradient
    reaches the layers before it until it has been trained.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layer = SparseLinear(config.in_channels, config.channels)
        self.blocks = nn.ModuleList(SparseBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.channels, elementwise_affine=False)
        self.out_layer = SparseLinear(config.channels, config.cell_size**3 + config.knots)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out_layer.weight)

    @property
    def fingerprint(self) -> str:
        """What distinguishes models of equal weights; empty for those of versions without `fraction_steps`."""
        steps = self.config.fraction_steps
        return f"fraction_steps {steps}" if steps else ""

    @property
    def shard_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def adapt(
        self, rank: int, alpha: float, dropout: float, ffn: bool, rank_pattern: Mapping[str, int]
    ) -> None:
        """Adapts the blocks, and trains `out_layer` in full unless `rank_pattern` gives it an adapter."""
        setup_lora_for_medical_finetuning(
            self, rank, alpha, dropout, include_ffn=ffn, rank_pattern=rank_pattern
        )

    def inputs(self, batch: RegionBatch) -> tuple[SparseTokens, Tensor]:
        """See `Trainee`."""
        return batch.tokens, batch.base_vox

    def losses(
        self, output: Tensor, batch: RegionBatch, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """See `mesh_losses`."""
        return mesh_losses(output, batch, weights)

    def distances(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output

    def forward(self, tokens: SparseTokens, base_vox: Tensor) -> Tensor:
        """Signed distances (B, X, Y, Z) in fine voxels, negative inside.

        tokens: feats (T, in_channels), coords (T, 4) sorted by sample.
        base_vox: (B, X, Y, Z), signed distances of the upsampled coarse segmentation.

        Raises: DataError if a shape, a cell or the order of the samples differs from that.
        """
        self._check(tokens, base_vox)
        batch = len(base_vox)
        layout = _Layout.of(tokens.coords, batch)
        hidden = self.input_layer(tokens)
        embedding = position_embedding(tokens.coords[:, 1:], self.config.channels)
        hidden = hidden.replace(hidden.feats + embedding.to(hidden.feats.dtype))
        for block in self.blocks:
            hidden = block(hidden, layout)
        out = self.out_layer(hidden.replace(self.norm(hidden.feats)))
        residual, curve = out.feats.split([self.config.cell_size**3, self.config.knots], dim=1)
        residual = residual + (self._grey_weights(tokens) * curve[:, None]).sum(-1)
        field = base_vox + self._scatter(tokens.replace(residual), batch).to(base_vox.dtype)
        return self._match_fractions(field, tokens) if self.config.fraction_steps else field

    def _match_fractions(self, field: Tensor, tokens: SparseTokens) -> Tensor:
        """Moves the surface so that each cell is filled to its coarse fraction: Newton steps on the cells, interpolated between their centres.

        Cells that are empty or full in the coarse segmentation are not changed by themselves.
        """
        size = self.config.cell_size
        fraction = (
            tokens.feats[:, -(3**3) // 2, None].to(field.dtype) / 2 + 0.5
        )  # of the cell itself
        n = self.config.coarse_size
        wanted = field.new_zeros(len(field), n, n, n, 1)
        wanted = wanted.index_put(tuple(tokens.coords.unbind(1)), fraction).permute(0, 4, 1, 2, 3)
        partly = ((wanted > 0) & (wanted < 1)).to(field.dtype)
        field = field[:, None]
        for _ in range(self.config.fraction_steps):
            inside = torch.sigmoid(-field / FRACTION_WIDTH_VOX)
            filled = F.avg_pool3d(inside, size)
            slope = F.avg_pool3d(inside * (1 - inside), size) / FRACTION_WIDTH_VOX
            shift = ((filled - wanted) / (slope + MIN_SLOPE)).clamp(-1, 1) * partly
            field = field + F.interpolate(shift, scale_factor=size, mode="trilinear")
        return field[:, 0]

    def _grey_weights(self, tokens: SparseTokens) -> Tensor:
        """Weight of each knot of the curve at each voxel of the cells: (T, cell³, knots), linear between two knots."""
        size, cell = self.config.patch_size, self.config.cell_size
        inner = slice(self.config.context, self.config.context + cell)
        patch = tokens.feats[:, : size**3].view(-1, size, size, size)
        grey = patch[:, inner, inner, inner].reshape(-1, cell**3, 1).clamp(-2, 2)
        knots = torch.linspace(-2, 2, self.config.knots, dtype=grey.dtype, device=grey.device)
        return (1 - (grey - knots).abs() * ((self.config.knots - 1) / 4)).clamp_min(0)

    def _scatter(self, residual: SparseTokens, batch: int) -> Tensor:
        """Puts each token's patch into its cell: (T, cell³) -> (B, X, Y, Z), zero in inactive cells."""
        n, c = self.config.coarse_size, self.config.cell_size
        cells = residual.feats.new_zeros(batch, n, n, n, c**3)
        cells = cells.index_put(tuple(residual.coords.unbind(1)), residual.feats)
        patches = cells.view(batch, n, n, n, c, c, c).permute(0, 1, 4, 2, 5, 3, 6)
        return patches.reshape(batch, n * c, n * c, n * c)

    def _check(self, tokens: SparseTokens, base_vox: Tensor) -> None:
        config = self.config
        if tokens.feats.shape[1] != config.in_channels:
            raise DataError(
                f"tokens.feats: expected (T, {config.in_channels}), got {tuple(tokens.feats.shape)}"
            )
        edge = config.coarse_size * config.cell_size
        if base_vox.ndim != 4 or base_vox.shape[1:] != (edge, edge, edge):
            raise DataError(
                f"base_vox: expected (B, {edge}, {edge}, {edge}), got {tuple(base_vox.shape)}"
            )
        if len(tokens.coords) == 0:
            return
        upper = torch.tensor(
            [len(base_vox)] + 3 * [config.coarse_size], device=tokens.coords.device
        )
        if bool((tokens.coords < 0).any()) or bool((tokens.coords >= upper).any()):
            raise DataError(
                f"tokens.coords: expected [sample, i, j, k] below {upper.tolist()}, "
                f"got {tokens.coords.amin(0).tolist()} to {tokens.coords.amax(0).tolist()}"
            )
        if bool((tokens.coords[:, 0].diff() < 0).any()):
            raise DataError("tokens.coords: expected the samples in ascending order")


def save_base_model(model: SparseMeshDecoder, path: Path, provenance: Mapping[str, Any]) -> None:
    """Writes `path` (safetensors, fp32) and its model card, a JSON file of the same name: sha256, configuration, provenance.

    Raises: ValueError for NaN or infinity in the provenance; nothing is written then.
    """
    data = save_safetensors(
        {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
    )
    card = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": asdict(model.config),
        **provenance,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_all({path: data, path.with_suffix(".json"): json_bytes(card)})


def load_base_model(path: str | Path | None = None) -> SparseMeshDecoder:
    """A decoder with the weights of `path` (default: the packaged base), checked against its model card.

    Raises: CheckpointError if a file is missing or unreadable, its sha256 is not the card's, or its tensors do not fit the
        card's configuration.
    """
    weights = BASE_WEIGHTS if path is None else Path(path)
    card_path = weights.with_suffix(".json")
    for file in (weights, card_path):
        if not file.is_file():
            raise CheckpointError(f"base model: no file {file}")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
        expected, config = card["sha256"], DecoderConfig(**card["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"base model: {card_path} is not a model card ({error})") from error
    data = weights.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CheckpointError(f"base model: {weights} has sha256 {found}, expected {expected}")
    model = SparseMeshDecoder(config)
    try:
        model.load_state_dict(load_safetensors(data))
    except RuntimeError as error:
        raise CheckpointError(f"base model: {weights} does not fit {card_path}: {error}") from error
    return model


@dataclass(frozen=True)
class DecoderOptions(ModelOptions):
    """The packaged decoder (`--model compact`), which has no options of its own.

    The default ranks train 2.86 % of its parameters (docs/medical_experiments.md).
    """

    default_rank: ClassVar[int] = 2
    default_ranks: ClassVar[tuple[str, ...]] = ("to_qkv=3", "out_layer=32")
    peak_lr: ClassVar[Mapping[str, float]] = {"lora": 1e-2, "full": 1e-3}
    loss_weights: ClassVar[Mapping[str, float]] = LOSS_WEIGHTS

    def load(self, base_weights: str | None) -> SparseMeshDecoder:
        """See `load_base_model`."""
        return load_base_model(base_weights)
