"""Tiles, in plain Python: a table per architecture, and the rules that fit a row of it to a problem.

No kernel is tuned when it is called. `gemm_config` and its kin are pure functions of the problem, so a compiled kernel, a
CUDA graph and a test see the same tiles; `python -m fastlora.tune` measures others and keeps what is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_RANK = 256
# Decode keeps all rows in one tile; above this many the general plans win.
DECODE_ROWS = 64
# A fused kernel holds a tile of S beside the base tile; wider ranks would spill or lose a pipeline stage.
FUSED_RANK = 64


@dataclass(frozen=True)
class Architecture:
    """What the tables and the cost model know of a GPU generation.

    shared: bytes of shared memory a block may use. tensor_memory: columns (sm_100), else 0. sms: of the usual part.
    tflops, tbps: dense 16-bit TFLOP/s and TB/s that real kernels reach. eta: our product's speed over cuBLAS's, assumed
    from published Triton kernels until measured.
    """

    capability: int
    shared: int
    tensor_memory: int
    sms: int
    tflops: float
    tbps: float
    eta: float


ARCHITECTURES = {
    80: Architecture(80, 166_912, 0, 108, 250.0, 1.6, 0.85),
    89: Architecture(89, 101_376, 0, 128, 280.0, 0.9, 0.85),
    90: Architecture(90, 232_448, 0, 132, 650.0, 3.0, 0.90),
    100: Architecture(100, 232_448, 512, 148, 1500.0, 7.0, 0.85),
}


def architecture(capability: tuple[int, int]) -> Architecture | None:
    """The row for a compute capability such as (9, 0), or None where the kernels were never compiled."""
    number = 10 * capability[0] + capability[1]
    return ARCHITECTURES.get({86: 89, 103: 100}.get(number, number))


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of `gemm.rank_gemm` and `gemm.rank_update_`."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptor: bool = False
    subtiles: int = 1
    programs: int = 0


@dataclass(frozen=True)
class PassConfig:
    """Tiles of a pass that reads one large operand once; `splits` cuts the summed dimension."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclass(frozen=True)
class Problem:
    """One call: x (m, k), weight (n, k), adapters of rank `rank`; itemsize in bytes; precision of float32 products."""

    m: int
    n: int
    k: int
    rank: int
    itemsize: int
    dropout: bool
    precision: str = "ieee"


@dataclass(frozen=True)
class Tiles:
    """The tiles of every kernel that a call may launch, forward and backward."""

    fused: GemmConfig
    split: GemmConfig
    update: GemmConfig
    down: PassConfig
    decode: PassConfig
    dy: PassConfig
    x: PassConfig
    dx: GemmConfig


def tiles(arch: Architecture, q: Problem, descriptor: bool) -> Tiles:
    """The table's tiles for a problem. descriptor: whether all its matrices suit tensor descriptors."""
    m, n, k, rank, size = q.m, q.n, q.k, q.rank, q.itemsize
    return Tiles(
        fused=gemm_config(arch, q, n, fused=True, descriptor=descriptor),
        split=gemm_config(arch, q, n, descriptor=descriptor),
        update=update_config(rank, size),
        down=down_config(arch, m, k, rank, size, descriptor),
        decode=decode_config(arch, m, n, k, rank, size),
        dy=dy_config(arch, m, n, rank, size),
        x=x_config(arch, m, k, rank, size),
        dx=gemm_config(arch, q, k, dropout=q.dropout, descriptor=descriptor),
    )


def rank_block(rank: int, most: int = MAX_RANK) -> int:
    """The padded rank: a power of two, at least 16 (the least inner dimension of a tensor-core product)."""
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def gemm_config(
    arch: Architecture,
    q: Problem,
    columns: int,
    *,
    fused: bool = False,
    dropout: bool = False,
    descriptor: bool = False,
) -> GemmConfig:
    """Tiles for a product of q.m rows and `columns` columns. fused, dropout: what the loop or the epilogue does besides.

    descriptor: whether the operands suit tensor descriptors; used on sm_90 and newer.
    """
    block_r = rank_block(q.rank, FUSED_RANK)
    if q.itemsize == 4:
        return _float_gemm(arch, block_r, q.precision)
    wave = -(-q.m // 128) * -(-columns // 256)
    if not descriptor and arch.capability >= 90:
        return GemmConfig(128, 64, 32, block_r, 8, 4)
    if arch.capability < 90:
        if not descriptor:
            return GemmConfig(64, 64, 32, block_r, 8, 3)
        stages = 4 if arch.shared > 150_000 else 3
        plain = arch.capability == 80 and block_r <= 32 and not (dropout or fused)
        return GemmConfig(128, 128, 32, block_r, 4 if plain else 8, stages)
    if arch.capability >= 100:
        config = GemmConfig(128, 128, 64, block_r, 8, 3, descriptor=True, subtiles=2)
    elif wave < arch.sms:
        # Less than one wave of large tiles would leave processors idle.
        config = GemmConfig(128, 128, 64, block_r, 8, 4, descriptor=True, subtiles=4)
    else:
        block_r = (
            min(block_r, 32) if dropout else block_r
        )  # the masked product has an accumulator of its own
        config = GemmConfig(128, 256, 64, block_r, 8, 4, descriptor=True, subtiles=4)
    if fused:
        config = replace(config, num_stages=3 if block_r <= 32 else 2)
    return replace(config, programs=arch.sms)


def _float_gemm(arch: Architecture, block_r: int, precision: str) -> GemmConfig:
    if precision == "ieee":
        # No tensor core multiplies float32 exactly: plain multiply-adds, whose operands live in registers.
        return GemmConfig(64, 64, 16, min(block_r, 16), 8, 2)
    block_m = 128 if arch.capability < 100 else 64
    return GemmConfig(block_m, 64, 32, min(block_r, 32), 8, 3 if arch.shared > 150_000 else 2)


def update_config(rank: int, itemsize: int) -> GemmConfig:
    """Tiles of `gemm.rank_update_`, which moves bytes and little else."""
    block_r = rank_block(rank, 64 if itemsize == 2 else 16)
    return GemmConfig(64, 128 if itemsize == 2 else 32, 0, block_r, 8, 2)


def down_config(
    arch: Architecture, m: int, k: int, rank: int, itemsize: int, aligned: bool
) -> PassConfig:
    """Tiles of the S pass: enough programs to fill the machine, along K too when the rows are few.

    aligned: whether rows of x can be read 16 bytes at a time; if not, every element is a load, with its own registers.
    """
    block_r = rank_block(rank)
    block_m = 64 if block_r <= 64 and m >= 128 * arch.sms else 32
    block_k = (128 if block_r <= 32 else 64) * 2 // itemsize
    if not aligned:
        block_k = 32
    tiles = -(-m // block_m)
    splits = max(1, min(k // (4 * block_k), arch.sms // tiles, 16))
    return PassConfig(block_m, 0, block_k, block_r, 8 if block_r > 32 else 4, 3, splits)


def decode_config(
    arch: Architecture, m: int, n: int, k: int, rank: int, itemsize: int
) -> PassConfig:
    """Tiles of the decode kernel: one tile of rows, W split along K until every processor streams a part of it."""
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n, block_k = 64, 128 * 2 // itemsize
    tiles = -(-n // block_n)
    splits = max(1, min(k // (2 * block_k), -(-2 * arch.sms // tiles), 16))
    return PassConfig(
        block_m, block_n, block_k, rank_block(rank), 4, 4 if arch.shared > 150_000 else 3, splits
    )


def dy_config(arch: Architecture, m: int, n: int, rank: int, itemsize: int) -> PassConfig:
    """Tiles of the pass over dy. Few tiles of rows keep the partial dB small; the columns are split to fill the machine."""
    block_r = rank_block(rank)
    # dS [block_m, block_r] lives in registers; before sm_90 so do the operands of its products.
    block_m = 128 if block_r <= 32 else 64 if block_r <= 128 else 32
    if arch.capability >= 90 and block_r > 32:
        block_m *= 2
    block_m = block_m * 2 // itemsize
    tiles = -(-m // block_m)
    splits = max(1, min(n // 256, -(-2 * arch.sms // tiles), 16))
    return PassConfig(block_m, 64 if block_r <= 128 else 32, 0, block_r, 8, 3, splits)


def x_config(arch: Architecture, m: int, k: int, rank: int, itemsize: int) -> PassConfig:
    """Tiles of the pass over x for dA; the rows are split to fill the machine."""
    block_r = rank_block(rank)
    block_k = (128 if block_r <= 64 else 64) * 2 // itemsize
    splits = max(1, min(m // 256, -(-2 * arch.sms // -(-k // block_k)), 32))
    return PassConfig(64, 0, block_k, block_r, 8, 3, splits)
