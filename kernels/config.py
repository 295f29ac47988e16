"""Tile sizes: a table for each GPU architecture, and the rules that adapt a row to a problem.

No kernel is tuned at call time. `gemm_config` and the similar functions are pure functions of the problem, so a compiled kernel, a
CUDA graph and a test use the same tiles; `python -m fastlora.tune` measures others and stores the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_RANK = 256
# A fused kernel keeps a tile of S in registers besides the base tile; higher ranks would spill or cost a pipeline stage.
FUSED_RANK = 64
# One pass over dy writes float32 partial sums of dS and dB; above this rank they cost more than the second pass that they save.
DY_RANK = 32
# A pass that also starts an output holds all ranks of the other factor in registers; above this rank a launch of its own starts it.
START_RANK = 64
# The kernels of `grouped` hold all ranks of a tile in registers.
GROUPED_RANK = 128


@dataclass(frozen=True)
class Architecture:
    """Properties of a GPU generation for the tile tables and the cost model.

    shared: bytes of shared memory that a block may use. tensor_memory: columns (sm_100), else 0. sms: SMs of the usual model.
    decode_rows: the most rows that the plan `decode` supports, all in one tile; with 64, sm_100 keeps scalars on the stack.
    tflops, tbps: dense 16-bit TFLOP/s and TB/s that real kernels reach. eta: speed of our GEMM kernel's loop relative to cuBLAS's.
    epilogues: picoseconds that cuBLAS and our kernel take for each element of the output, beyond the loop.
    The numbers of sm_90 were fitted to an H100; the others are assumed, with eta from published Triton kernels.
    """

    capability: int
    shared: int
    tensor_memory: int
    sms: int
    decode_rows: int
    tflops: float
    tbps: float
    eta: float
    epilogues: tuple[float, float] = (0.0, 0.0)


ARCHITECTURES = {
    80: Architecture(80, 166_912, 0, 108, 64, 250.0, 1.6, 0.85),
    89: Architecture(89, 101_376, 0, 128, 64, 280.0, 0.9, 0.85),
    90: Architecture(90, 232_448, 0, 132, 64, 830.0, 3.0, 0.98, (0.45, 1.0)),
    100: Architecture(100, 232_448, 512, 148, 32, 1500.0, 7.0, 0.85),
}


def architecture(capability: tuple[int, int]) -> Architecture | None:
    """The row for a compute capability such as (9, 0), or None if the compile gate does not compile for it.

    8.6 has the limits of 8.9, and 10.3 those of 10.0; their code is compiled at run time.
    """
    number = 10 * capability[0] + capability[1]
    return ARCHITECTURES.get({86: 89, 103: 100}.get(number, number))


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of `gemm.rank_gemm`, `update.rank_update_` and `gated.gated_gradients_`.

    overlap: by programmatic dependent launch (sm_90 and newer, with descriptors) the product of x and W begins while the previous
    pass is running, and waits for it before reading S, dS or the mask. x and W must be complete before the launch.
    prefetch: load what the epilogue reads before the loop, where one block holds all ranks and no launch overlaps.
    """

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
    overlap: bool = False
    prefetch: bool = False


@dataclass(frozen=True)
class PassConfig:
    """Tiles of a pass that reads one large operand once; `splits` divides the summed dimension.

    overlap: lets the next kernel begin before the pass has ended; for `decode` that is its second kernel.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    splits: int = 1
    overlap: bool = False


@dataclass(frozen=True)
class Problem:
    """One call: x (m, k), weight (n, k), adapters of rank `rank`; itemsize in bytes; precision of float32 products.

    aligned: whether the rows of every large matrix are contiguous, start at multiples of 16 bytes and have a pitch that is a multiple of
    16 elements, so that loads are vectorised, or use tensor descriptors where the GPU has them.
    """

    m: int
    n: int
    k: int
    rank: int
    itemsize: int
    dropout: bool
    precision: str = "ieee"
    aligned: bool = True


@dataclass(frozen=True)
class Tiles:
    """The tiles of every kernel that a call may launch, forward and backward."""

    fused: GemmConfig
    split: GemmConfig
    update: GemmConfig
    down: PassConfig
    start: PassConfig
    decode: PassConfig
    dy: PassConfig
    x: PassConfig
    dx: GemmConfig

    def overlapped(self) -> Tiles:
        """The same tiles, with `overlap` set for every kernel that supports it."""
        names = ("split", "down", "decode", "x", "dx")
        changed = {name: replace(getattr(self, name), overlap=True) for name in names}
        return replace(self, **changed)


def tiles(arch: Architecture, q: Problem) -> Tiles:
    """The table's tiles for a problem."""
    found = Tiles(
        fused=gemm_config(arch, q, q.n, fused=True),
        split=gemm_config(arch, q, q.n),
        update=update_config(q),
        down=down_config(arch, q),
        start=start_config(arch, q),
        decode=decode_config(arch, q),
        dy=dy_config(arch, q),
        x=x_config(arch, q),
        dx=gemm_config(arch, q, q.k, dropout=q.dropout),
    )
    if arch.capability == 90 and found.dx.programs > arch.sms:
        # A short product: on an H100 dA and dx together take 9 % less with overlapping launches at 4096×768→768, but 12 % more at 8192×4096→4096.
        x, dx = replace(found.x, overlap=True), replace(found.dx, overlap=True)
        found = replace(found, x=x, dx=dx)
    return found


def rank_block(rank: int, most: int = MAX_RANK) -> int:
    """The padded rank: a power of two, at least 16 (the smallest inner dimension of a tensor-core product)."""
    return min(most, max(16, next_power_of_2(rank)))


def fused_rank(itemsize: int, precision: str) -> int:
    """The highest rank that the plans `fused` and `decode` support: their tile of S holds all ranks at once."""
    if itemsize == 2:
        return FUSED_RANK
    return 16 if precision == "ieee" else 32


def gemm_config(
    arch: Architecture, q: Problem, columns: int, *, fused: bool = False, dropout: bool = False
) -> GemmConfig:
    """Tiles for a product of q.m rows and `columns` columns. fused: whether its loop computes S too. dropout: whether its epilogue applies a mask."""
    block_r = rank_block(q.rank, fused_rank(q.itemsize, q.precision))
    if q.itemsize == 4:
        return _float_gemm(arch, block_r, q.precision)
    if not q.aligned:
        # Every element is loaded separately, with its own registers.
        return GemmConfig(128 if arch.capability >= 90 else 64, 64, 32, block_r, 8, 3)
    if arch.capability < 90:
        stages = 4 if arch.shared > 150_000 else 3
        block_r = block_r if q.rank <= 64 else 32
        plain = arch.capability == 80 and q.rank <= 32 and not (dropout or fused)
        return GemmConfig(128, 128, 32, block_r, 4 if plain else 8, stages)
    if arch.capability >= 100:
        config = GemmConfig(128, 128, 64, block_r, 8, 3, descriptor=True, subtiles=2)
    elif ceil_div(q.m, 128) * ceil_div(columns, 256) < arch.sms:
        # Less than one wave of large tiles would leave SMs idle. Two programs on an SM hide each other's epilogue.
        subtiles = 4 if fused or q.rank > 16 else 2
        config = GemmConfig(128, 128, 64, block_r, 4, 3, descriptor=True, subtiles=subtiles)
        return replace(config, programs=2 * arch.sms, prefetch=fused and q.rank <= 16)
    else:
        # The masked product needs a second accumulator, so fewer ranks fit at once.
        block_r = min(block_r, 32 if q.rank <= 64 else 16) if dropout else block_r
        # Wide strips cost registers, which a tile of S and many ranks need too.
        subtiles = 4 if fused or q.rank > 16 else 2
        config = GemmConfig(128, 256, 64, block_r, 8, 4, descriptor=True, subtiles=subtiles)
    if fused:
        # A tile of A for each stage, beside those of x and W.
        most = 4 if block_r <= 16 else 3
        prefetch = arch.capability == 90 and q.rank <= 16
        config = replace(config, num_stages=min(config.num_stages, most), prefetch=prefetch)
    return replace(config, programs=arch.sms)


def _float_gemm(arch: Architecture, block_r: int, precision: str) -> GemmConfig:
    if precision == "ieee":
        # No tensor core multiplies float32 exactly: plain multiply-adds, whose operands live in registers.
        return GemmConfig(64, 64, 16, block_r, 8, 2)
    block_m = 128 if arch.capability < 100 else 64
    return GemmConfig(block_m, 64, 32, block_r, 8, 3 if arch.shared > 150_000 else 2)


def update_config(q: Problem) -> GemmConfig:
    """Tiles of `gemm.rank_update_`, which is limited by memory bandwidth."""
    if q.itemsize == 4:
        return GemmConfig(64, 32, 0, 16, 8, 2)
    block_r = rank_block(q.rank, 64)
    if q.aligned and block_r <= 32:
        return GemmConfig(32, 128, 0, block_r, 4, 2)
    return GemmConfig(64, 128 if q.aligned else 64, 0, block_r, 8, 2)


def gated_config(update: GemmConfig, itemsize: int) -> GemmConfig:
    """Tiles of `gated.gated_gradients_`, from those of `rank_update_`: it holds five tiles in registers, not two.

    With 8 warps a thread has 8 elements in 16 bits, one vector of each matrix, and four programs of a tile of 32 × 64 fit an SM.
    """
    if itemsize == 4:
        return update
    return replace(update, block_m=32, block_n=64, num_warps=8)


def gated_down_config(down: PassConfig) -> PassConfig:
    """Tiles of `gated.gated_down`, from those of the S pass: it loads two wide tiles for one."""
    block_k = max(min(64, down.block_k), down.block_k // 2)
    warps = 8 if down.block_m * block_k >= 4096 else down.num_warps
    return replace(down, block_k=block_k, num_warps=warps, overlap=False)


def down_config(arch: Architecture, q: Problem) -> PassConfig:
    """Tiles of the S pass: enough programs to fill the GPU, split along K too when there are few rows."""
    block_r = rank_block(q.rank)
    block_m = 32
    block_k = (
        256
        if block_r <= 16 and q.aligned
        else 128
        if block_r <= 32 and q.aligned
        else 64
        if block_r <= 64 and q.aligned
        else 32
    )
    block_k = max(16, block_k * 2 // q.itemsize)
    splits = max(1, min(q.k // (4 * block_k), arch.sms // ceil_div(q.m, block_m), 16))
    return PassConfig(block_m, 0, block_k, block_r, 8 if block_r > 32 else 4, 3, splits)


def start_config(arch: Architecture, q: Problem) -> PassConfig:
    """Tiles of the pass that makes S and y₀: those of the S pass, never split along K."""
    config = down_config(arch, q)
    # A tile of float32 lora_B has at most 16 KiB (up to rank 128), since several are in flight.
    block_n = max(32, 4096 // config.block_r * 2 // q.itemsize)
    return replace(config, block_n=block_n if q.aligned else min(64, block_n), splits=1)


def decode_config(arch: Architecture, q: Problem) -> PassConfig:
    """Tiles of the decode kernel: one tile of rows, W split along K into as many parts as two programs per SM can hold."""
    block_m = 16 if q.m <= 16 else 32 if q.m <= 32 else 64
    # Narrow enough that two programs per SM fit with float32 adapters of 16-bit weights.
    block_n, block_k = (64, 64) if q.itemsize == 2 else (32, 64 if block_m < 64 else 32)
    if not q.aligned:
        block_k = max(16, block_k // 4)  # the inner dimension of a product has at least 16 elements
    stages = 4 if block_m <= 32 and arch.shared > 150_000 else 2
    block_r = rank_block(q.rank, fused_rank(q.itemsize, q.precision))
    columns = ceil_div(q.n, block_n) + ceil_div(block_r, block_n)
    splits = max(1, min(q.k // (2 * block_k), 2 * arch.sms // columns, 16))
    # On an H100 8 warps are 3 % faster than 4 for one row, and overlapping launches 2 % than separate ones.
    overlap = arch.capability == 90 and q.itemsize == 2
    warps = 8 if block_m >= 32 or overlap else 4
    return PassConfig(block_m, block_n, block_k, block_r, warps, stages, splits, overlap=overlap)


def dy_config(arch: Architecture, q: Problem) -> PassConfig:
    """Tiles of the pass over dy: wide, since every tile of columns writes a partial sum of dS; the rows are split."""
    block_r = rank_block(q.rank, DY_RANK)
    block_n = (256 if q.aligned else 128) * 2 // q.itemsize
    block_m = 32
    splits = max(1, min(q.m // (4 * block_m), 2 * arch.sms // ceil_div(q.n, block_n), 64))
    warps = 4 if q.itemsize == 2 and q.aligned else 8
    return PassConfig(block_m, block_n, 0, block_r, warps, 3, splits)


def x_config(arch: Architecture, q: Problem) -> PassConfig:
    """Tiles of the pass over x for dA; the rows are split to fill the GPU."""
    block_r = rank_block(q.rank)
    block_m = 64 if q.aligned and (q.itemsize == 2 or block_r <= 64) else 32
    if q.itemsize == 4 and block_r > 64:
        block_m = 16 if arch.capability < 100 else 32
    block_k = (128 if block_r <= 64 and q.aligned else 64) * 2 // q.itemsize
    splits = max(1, min(q.m // (4 * block_m), 2 * arch.sms // ceil_div(q.k, block_k), 32))
    return PassConfig(block_m, 0, block_k, block_r, 8, 3 if arch.shared > 150_000 else 2, splits)


@dataclass(frozen=True)
class GroupedTiles:
    """The tiles of the kernels of `grouped` and `grouped_backward`."""

    down: PassConfig
    up: GemmConfig
    dy: PassConfig
    x: PassConfig


def grouped_tiles(arch: Architecture, q: Problem, groups: int) -> GroupedTiles:
    """The table's tiles for passes over rows of `groups` groups, of unknown sizes; q.m rows in all.

    A block of rows has one group, so it is as small as an average group, down to the 16 rows of a tensor-core product. Chunks of rows are as
    long as for a single group: that fills the GPU however the rows are divided.
    """
    most = max(16, next_power_of_2(ceil_div(q.m, groups)))

    def fitted(config: PassConfig) -> PassConfig:
        return replace(config, block_m=min(config.block_m, most))

    down = fitted(down_config(arch, q))
    blocks = q.m // down.block_m + min(groups, q.m)
    splits = max(1, min(q.k // (4 * down.block_k), arch.sms // blocks, 16))
    # More rows than `update_config` has, since the factor of a group is read again for each block.
    up = update_config(q)
    block_m = min(64, most)
    x = fitted(x_config(arch, q))
    if q.itemsize == 4 and q.precision == "ieee":
        # The mask is computed beside the product, whose operands are in registers too.
        x = replace(x, block_m=min(x.block_m, 32 if arch.capability < 100 else 16))
    return GroupedTiles(
        down=replace(down, splits=splits),
        up=replace(up, block_m=block_m, num_warps=8 if block_m > 16 else 4),
        dy=fitted(dy_config(arch, q)),
        x=x,
    )


def chunks(size: int, splits: int, block: int) -> tuple[int, int]:
    """(length of a chunk, number of chunks): `size` divided into at most `splits` chunks of full blocks."""
    chunk = ceil_div(ceil_div(size, splits), block) * block
    return chunk, ceil_div(size, chunk)


def ceil_div(size: int, block: int) -> int:
    """⌈size / block⌉; `triton.cdiv` takes 5 µs."""
    return -(-size // block)


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()
