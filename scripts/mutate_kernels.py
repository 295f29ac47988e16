"""Mutation tests of the kernels: change the source in one place at a time and check that a test fails.

    python scripts/mutate_kernels.py [--jobs 2] [--only TEXT ...]

A mutant is a copy of the project with one piece of source replaced. The tests of that source run on it, kernels in Triton's
interpreter, and the mutant is detected if one fails. Exit code 0: all mutants were detected; 1: some were not; 2: the unchanged project fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit code where it selected none


@dataclass(frozen=True)
class Mutant:
    """In `file`, the `nth` occurrence of `old` is replaced by `new`."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0

    def apply(self, root: Path) -> None:
        """Change the copy of the project at `root`.

        Raises: SystemExit if `old` does not occur.
        """
        path = root / self.file
        parts = path.read_text().split(self.old)
        if len(parts) < self.nth + 2:
            raise SystemExit(f"{self.name}: {self.old!r} is not in {self.file}")
        path.write_text(
            self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])
        )


MASK, TILES, GEMM, FORWARD = (
    "kernels/dropout.py",
    "kernels/tiles.py",
    "kernels/gemm.py",
    "kernels/forward.py",
)
BACKWARD, REDUCE, CONFIG = "kernels/backward.py", "kernels/reduce.py", "kernels/config.py"
LAUNCH, RECORDING, STEPS = "kernels/launch.py", "kernels/recording.py", "kernels/steps.py"
NATIVE, STARTS = "kernels/native.py", "kernels/launches.c"
TERM, UPDATE = "kernels/rank_term.py", "kernels/update.py"
OPS, LINEAR = "fastlora/ops/triton/linear.py", "fastlora/ops/linear.py"
GROUPED, GROUPED_BACKWARD = "kernels/grouped.py", "kernels/grouped_backward.py"
GROUPED_OPS = "fastlora/ops/triton/grouped.py"
GATED, BLOCKS = "kernels/gated.py", "fastlora/layers/gated.py"
GATED_OPS, TRITON_GATED = "fastlora/ops/gated.py", "fastlora/ops/triton/gated.py"
SEARCH, ROWS = "fastlora/model/gated.py", "fastlora/ops/group.py"
DISPATCH, FUSION = "fastlora/ops/dispatch.py", "fastlora/model/fusion.py"
EXPERTS, TRITON_EXPERTS = "fastlora/ops/experts.py", "fastlora/ops/triton/experts.py"
MIXED, TRITON_MIXED = "fastlora/ops/mixed.py", "fastlora/ops/triton/mixed.py"
PRODUCTS, GROUP = "fastlora/ops/products.py", "fastlora/ops/triton/group.py"
REFERENCE, DEFINITION = "fastlora/ops/reference.py", "fastlora/ops/dropout.py"
TUNE, BENCH = "fastlora/ops/tune.py", "fastlora/ops/bench.py"

# The tests that must detect a mutant, by the file that it changes; for every other file the tests of the kernels.
KERNEL_TESTS = (
    "tests/kernels/test_kernels.py",
    "tests/ops/triton/test_linear.py",
    "tests/ops/test_dispatch.py",
)
TESTS = {
    LAUNCH: ("tests/kernels/test_launch.py",),  # the interpreter does not use the table
    GROUP: ("tests/ops/triton/test_linear.py", "tests/kernels/test_recording.py"),
    CONFIG: (*KERNEL_TESTS, "tests/kernels/test_grouped.py"),
    GROUPED: ("tests/kernels/test_grouped.py",),
    GROUPED_BACKWARD: ("tests/kernels/test_grouped.py",),
    GROUPED_OPS: ("tests/kernels/test_grouped.py",),
    EXPERTS: ("tests/ops/test_experts.py", "tests/ops/triton/test_experts.py"),
    MIXED: ("tests/ops/triton/test_mixed.py", "tests/ops/test_mixed.py"),
    TRITON_MIXED: ("tests/ops/triton/test_mixed.py",),
    TRITON_EXPERTS: ("tests/ops/triton/test_experts.py",),
    PRODUCTS: (*KERNEL_TESTS, "tests/ops/test_experts.py", "tests/ops/triton/test_experts.py"),
    GATED: ("tests/kernels/test_gated.py", "tests/ops/triton/test_gated.py"),
    GATED_OPS: ("tests/ops/test_gated.py",),
    TRITON_GATED: ("tests/ops/triton/test_gated.py",),
    BLOCKS: ("tests/model/test_gated.py", "tests/model/test_gated_search.py"),
    SEARCH: ("tests/model/test_gated_search.py", "tests/model/test_gated.py"),
    FUSION: ("tests/model/test_gated.py",),
    ROWS: ("tests/ops/test_gated.py", "tests/ops/triton/test_gated.py"),
    DISPATCH: (*KERNEL_TESTS, "tests/ops/triton/test_gated.py"),
    RECORDING: ("tests/kernels/test_recording.py", "tests/kernels/test_launch.py"),
    STEPS: (
        "tests/kernels/test_recording.py",
        "tests/kernels/test_launch.py",
        "tests/kernels/test_driver.py",
    ),
    NATIVE: ("tests/kernels/test_driver.py",),
    STARTS: ("tests/kernels/test_driver.py",),
    DEFINITION: ("tests/ops/test_dropout.py",),
    TUNE: ("tests/ops/test_tune.py",),
    BENCH: ("tests/ops/test_tune.py",),
}

MUTANTS = (
    # the mask
    Mutant("philox: ten rounds", MASK, "ROUNDS = tl.constexpr(7)", "ROUNDS = tl.constexpr(10)"),
    Mutant("philox: row and column swapped", MASK, "c0 = zero + o_group.to(tl.uint32)[None, :]\n    c1 = zero", "c1 = zero + o_group.to(tl.uint32)[None, :]\n    c0 = zero"),
    Mutant("philox: a different key", MASK, "k0, k1 = seed.to(tl.uint32)", "k0, k1 = (seed ^ 1).to(tl.uint32)"),
    Mutant("philox: the key's high half is the low one", MASK, "(seed >> 32).to(tl.uint32)", "seed.to(tl.uint32)"),
    Mutant("philox: words of a round swapped", MASK, "c1, c3 = wide_1", "c3, c1 = wide_1"),
    Mutant("philox: the key's steps swapped", MASK, "k0 += tl.full([], 0x9E3779B9", "k0 += tl.full([], 0xBB67AE85"),
    Mutant("mask: words in a different order", MASK, "_reach(w0, least) >> 3 | _reach(w1, least) >> 2", "_reach(w1, least) >> 3 | _reach(w0, least) >> 2"),
    Mutant("mask: a word at a different place", MASK, "_reach(w2, least) >> 1", "_reach(w2, least) >> 2"),
    Mutant("mask: halves swapped", MASK, "bits >> 12 & 0xF | bits >> 24 & 0xF0", "bits >> 28 & 0xF | bits >> 8 & 0xF0"),
    Mutant("mask: the low half carries into the high one", MASK, "(least & 0x7FFF7FFF)", "(least & 0x7FFFFFFF)"),
    Mutant("mask: a carry for every set bit", MASK, "(word & least | (word | least) & carry_in)", "(word & least | word & carry_in)"),
    Mutant("mask: > for >=", MASK, "65536 - threshold", "65535 - threshold"),
    Mutant("mask: the threshold of the low halves only", MASK, "least = least | least << 16", "least = least | 0x8000 << 16"),
    Mutant("mask: dropped by multiplication", MASK, "tl.where(tl.reshape(eights, block.shape) != 0, block, 0.0)",
           "tl.reshape(eights, block.shape).to(block.dtype) * block"),
    Mutant("mask: a threshold of 0 drops", MASK, "self.seed is not None and self.threshold > 0", "self.seed is not None"),
    Mutant("drop: lanes in a different order", MASK, "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    Mutant("drop: halves swapped", MASK, "tl.join(words << 16, words)", "tl.join(words, words << 16)"),
    Mutant("drop: the halves of a word are neighbours", MASK, "[0, 1, 3, 2])  # [.., half", "[0, 1, 2, 3])  # [.., half"),
    Mutant("drop: > for >=", MASK, ">= threshold.to(tl.uint32)", "> threshold.to(tl.uint32)"),
    Mutant("drop: the next group of columns", MASK, "first_col // 8 +", "first_col // 8 + 1 +"),
    Mutant("drop: the tile's row is ignored", MASK, "o_row = first_row +", "o_row = 0 * first_row +"),
    Mutant("drop: by multiplication", MASK, "tl.where(tl.reshape(lanes, block.shape) >= threshold.to(tl.uint32) << 16, block, 0.0)",
           "(tl.reshape(lanes, block.shape) >= threshold.to(tl.uint32) << 16).to(block.dtype) * block"),
    Mutant("bits: a different order", MASK, ">> tl.arange(0, 8)", ">> (7 - tl.arange(0, 8))"),
    Mutant("bits: every block of groups is the first", MASK, "o_group = first_group + first +", "o_group = first_group +"),
    Mutant("bits: rows without their pitch", MASK, "[:, None] * stride + o_group", "[:, None] * tl.cdiv(K, 8) + o_group"),
    Mutant("bits: rows past the end", MASK, "mask = (o_row < M)[:, None]", "mask = (o_row < M - 1)[:, None]"),
    # the definition of the mask
    Mutant("definition: ten rounds", DEFINITION, "ROUNDS = 7", "ROUNDS = 10"),
    Mutant("definition: the halves of a word are neighbours", DEFINITION,
           "[word & 0xFFFF for word in words] + [(word >> 16) & 0xFFFF for word in words], dim=-1", "[half for word in words for half in (word & 0xFFFF, (word >> 16) & 0xFFFF)], dim=-1"),
    Mutant("definition: the threshold is rounded down", DEFINITION, "round(p * 65536)", "int(p * 65536)"),
    Mutant("definition: the factor of p itself", DEFINITION, "65536 / (65536 - dropout_threshold(p))", "1 / (1 - p)"),
    Mutant("definition: a CPU's mask for the kernels", DEFINITION, "x.device.type == \"cpu\" and not triton", "x.device.type == \"cpu\""),
    # the order of tiles
    Mutant("tiles: group width", TILES, "(pid // width) * GROUP_M", "(pid // width)"),
    Mutant("tiles: rows of the last group", TILES, "min(num_m - first_m, GROUP_M)", "GROUP_M"),
    Mutant("tiles: halves interleaved", TILES, "[block.shape[0], 2, block.shape[1] // 2]", "[block.shape[0], block.shape[1] // 2, 2]"),
    # the main GEMM
    Mutant("gemm: stride of x", GEMM, "[None, :] * stride_xk", "[None, :] * stride_xm"),
    Mutant("gemm: step of W", GEMM, "p_w += step * stride_wk", "p_w += step * stride_wn"),
    Mutant("gemm: inner dimension unmasked", GEMM, "x = tl.load(p_x, mask=m_k[None, :], other=0.0)", "x = tl.load(p_x)"),
    Mutant("gemm: rows past the end stored", GEMM, "mask=(o_m < M)[:, None] & (o_n < N)[None, :]", "mask=(o_m < M + 1)[:, None] & (o_n < N)[None, :]", 0),
    Mutant("gemm: first block of ranks only", TERM, "range(0, R if R > BLOCK_R else 0, BLOCK_R)", "range(0, BLOCK_R if R > BLOCK_R else 0, BLOCK_R)"),
    Mutant("gemm: low of the first block of ranks", TERM, "low_tile(low_ptr, M, first_m, first_r, R, acc", "low_tile(low_ptr, M, first_m, 0, R, acc"),
    Mutant("gemm: term reset with every block of ranks", TERM, "tl.dot(low, up, term, input", "tl.dot(low, up, input"),
    Mutant("gemm: ranks of low unmasked", TERM, "mask = (o_m < M)[:, None] & (o_r < R)[None, :]", "mask = (o_m < M)[:, None] & (o_r < R + 1)[None, :]"),
    Mutant("gemm: ranks of up unmasked", TERM, "mask = (o_r < R)[:, None] & (o_n < N)[None, :]", "mask = (o_r < R + 1)[:, None] & (o_n < N)[None, :]"),
    Mutant("gemm: no mask on the rank term", TERM, "        term = drop_bits(term, bits)\n", "        term = term\n"),
    Mutant("gemm: mask on the base product too", TERM, "        term = drop_bits(term, bits)\n", "        term, acc = drop_bits(term, bits), drop_bits(acc, bits)\n"),
    Mutant("gemm: bits of a different row", TERM, "bits_ptr + o_m[:, None] * stride_bits", "bits_ptr + o_m[:, None] * (N // 8)"),
    Mutant("gemm: bits of different columns", TERM, "o_byte = first_n // 8 +", "o_byte = 0 * first_n +"),
    Mutant("gemm: no factor", TERM, "return acc + term * scale", "return acc + term"),
    Mutant("gemm: factor twice", TERM, "return acc + term * scale", "return acc + term * scale * scale"),
    Mutant("gemm: factor of the base product too", TERM, "return acc + term * scale", "return (acc + term) * scale"),
    Mutant("gemm: S with its factor", GEMM, "low = s.to(DTYPE)", "low = (s * scale).to(DTYPE)", 0),
    Mutant("gemm: S with its factor, descriptors", GEMM, "low = s.to(DTYPE)", "low = (s * scale).to(DTYPE)", 1),
    Mutant("gemm: S not stored", GEMM, "if tile_n == 0", "if tile_n == 1", 0),
    Mutant("gemm: S not stored, descriptors", GEMM, "if tile_n == 0", "if tile_n == 1", 1),
    Mutant("gemm: no bias", GEMM, "HAS_BIAS\": bias is not None", "HAS_BIAS\": False"),
    Mutant("gemm: bias of the first columns", TERM, "o_n = first_n + tl.arange(0, WIDTH)\n    return", "o_n = tl.arange(0, WIDTH)\n    return"),
    Mutant("gemm: second strip at the first's position", GEMM, "first_n + acc.shape[1] // 2", "first_n"),
    Mutant("gemm: prefetched B of the other strip", GEMM, "up_left, up_right = halves(up)", "up_right, up_left = halves(up)"),
    Mutant("gemm: prefetched bits of the other strip", GEMM, "bits_left, bits_right = halves(bits)", "bits_right, bits_left = halves(bits)"),
    Mutant("gemm: prefetched bits of the first strip", GEMM, "right, low, up_right, bits_right, bias_ptr", "right, low, up_right, bits_left, bias_ptr"),
    Mutant("gemm: persistent stride", GEMM, "tl.num_programs(0)", "tl.num_programs(0) + 1"),
    Mutant("gemm: update overwrites instead of adding", UPDATE, "acc = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)", "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"),
    Mutant("gemm: product added to memory that was not written", UPDATE, "bits, precision, add=False)", "bits, precision, add=True)"),
    Mutant("gemm: no bias beside cuBLAS", UPDATE, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
    # the forward passes
    Mutant("S: partial sum of a different split", FORWARD, "s_ptr + split.to(tl.int64) * M * R, s", "s_ptr + 0 * M * R, s"),
    Mutant("S: chunk starts at 0", FORWARD, "first_k = split * k_chunk", "first_k = 0", 0),
    Mutant("S: mask column of the first block", FORWARD, "threshold, first_m, k)", "threshold, first_m, first_k)"),
    Mutant("S: step of A", FORWARD, "p_rows += step * stride_k", "p_rows += step"),
    Mutant("start: ranks past the end", FORWARD, "tl.where((o_r < R)[None, :], s, 0.0).to(DTYPE)", "s.to(DTYPE)"),
    Mutant("start: no factor", FORWARD, "y = tl.dot(low, b, input_precision=PRECISION) * scale", "y = tl.dot(low, b, input_precision=PRECISION)"),
    Mutant("start: S with its factor", FORWARD, "store_rows(s_ptr, low, M, R, first_m, 0)", "store_rows(s_ptr, s * scale, M, R, first_m, 0)"),
    Mutant("start: one tile of columns", FORWARD, "for first_n in range(0, N, BLOCK_N)", "for first_n in range(0, min(N, BLOCK_N), BLOCK_N)"),
    Mutant("start: no bias", FORWARD, "HAS_BIAS=bias is not None", "HAS_BIAS=False", 0),
    Mutant("start: no dropout", FORWARD, "DROPOUT=mask.drops", "DROPOUT=False", 1),
    Mutant("decode: one split is missing", FORWARD, "for _ in range(splits)", "for _ in range(splits - 1)"),
    Mutant("decode: no factor", FORWARD, "acc += tl.dot(low, b, input_precision=PRECISION) * scale", "acc += tl.dot(low, b, input_precision=PRECISION)"),
    Mutant("decode: W dropped out too", FORWARD, "0, tile * BLOCK_N, False,", "0, tile * BLOCK_N, DROPOUT,"),
    Mutant("decode: tiles of A", FORWARD, "first_r = (tile - w_tiles) * BLOCK_N", "first_r = (tile - w_tiles + 1) * BLOCK_N"),
    # the backward passes
    Mutant("dS: with its factor", BACKWARD, "ds_t.to(ds_ptr", "(ds_t * scale).to(ds_ptr"),
    Mutant("dS: partial sum of a different tile", BACKWARD, "ds_ptr += tile.to(tl.int64) * M * R", "ds_ptr += 0 * M * R"),
    Mutant("dS, dB: rows of one block", BACKWARD, "for m in range(first_m, min(first_m + m_chunk, M), BLOCK_M)", "for m in range(first_m, min(first_m + BLOCK_M, M), BLOCK_M)", 0),
    Mutant("dB: no factor", BACKWARD, "(db_t * scale)", "(db_t)"),
    Mutant("dB: partial sum of a different split", BACKWARD, "db_ptr + split.to(tl.int64) * N * R", "db_ptr + 0 * N * R"),
    Mutant("dB: reset with every block", BACKWARD, "tl.dot(s_t, dy, db_t, input", "tl.dot(s_t, dy, input"),
    Mutant("dS, dB: rows past the end", BACKWARD, "m_m = o_m < M\n        m_row", "m_m = o_m < M - 1\n        m_row"),
    Mutant("dB: ranks past the end", BACKWARD, "m_rn = m_r[:, None] & m_n[None, :]", "m_rn = (o_r < R + 1)[:, None] & m_n[None, :]"),
    Mutant("dS, dB: chunk of rows", BACKWARD, "first_m = split * m_chunk", "first_m = 0", 0),
    Mutant("bits: groups of the first tile", BACKWARD, "tile * GROUPS,", "0 * tile,"),
    Mutant("bits: groups of a different tile", BACKWARD, "tile * GROUPS,", "split * GROUPS,"),
    Mutant("bits: rows of the first block", BACKWARD, "K, m + tl.arange(0, BLOCK_M), tile", "K, first_m + tl.arange(0, BLOCK_M), tile"),
    Mutant("bits: groups past the end", BACKWARD, "EVEN_K=columns == 8 * groups * tiles", "EVEN_K=columns % 8 == 0"),
    Mutant("bits: groups past the end of every tile but the first", BACKWARD, "EVEN_K=columns == 8 * groups * tiles", "EVEN_K=columns == 8 * groups"),
    Mutant("bits: groups past the end, alone", BACKWARD, "EVEN_K=columns % (8 * _MASK_GROUPS) == 0", "EVEN_K=columns % 8 == 0"),
    Mutant("bits: groups of the first tile, alone", BACKWARD, "first_group = tl.program_id(1) * BLOCK_G", "first_group = tl.program_id(1)"),
    Mutant("dA: chunk of rows", BACKWARD, "first_m = split * m_chunk", "first_m = 0", 1),
    Mutant("dA: no factor", BACKWARD, "(da * scale)", "(da)"),
    Mutant("dA: mask row", BACKWARD, "bits_ptr + o_m[:, None] * stride_bits", "bits_ptr + (o_m - m + first_m)[:, None] * stride_bits"),
    Mutant("dA: mask columns of the first block", BACKWARD, "o_byte = first_k // 8 +", "o_byte = 0 * first_k +"),
    Mutant("dA: no dropout", BACKWARD, "DROPOUT=bits is not None", "DROPOUT=False"),
    Mutant("dx0: no factor", BACKWARD, "tl.dot(tl.trans(ds_t), a, input_precision=PRECISION) * scale", "tl.dot(tl.trans(ds_t), a, input_precision=PRECISION)"),
    Mutant("dx0: no mask", BACKWARD, "dx = drop_bits(dx, bits)", "dx = dx"),
    Mutant("dx0: pitch of x", BACKWARD, "dx_ptr + o_m[:, None] * K", "dx_ptr + o_m[:, None] * stride_xm"),
    Mutant("sums: the last partial sum is missing", REDUCE, "first + o_split < splits", "first + o_split < splits - 1"),
    Mutant("sums: the first partial sums only", REDUCE, "for first in range(0, splits, SPLITS)", "for first in range(0, SPLITS, SPLITS)"),
    Mutant("sums: the wrong stride", REDUCE, "(first + o_split)[:, None] * size", "(first + o_split)[:, None] * (size - 1)"),
    Mutant("sums: the second reads the first's parts", REDUCE, "_sum_block(part_2, out_2", "_sum_block(part_1, out_2"),
    Mutant("sums: the second begins at the first's end", REDUCE, "block - blocks_1", "block"),
    Mutant("sums: too few programs for both", REDUCE, "(ceil_div(sizes[0], block) + ceil_div(sizes[1], block),)", "(ceil_div(sizes[0] + sizes[1], block),)"),
    # sums in 16 bits
    Mutant("16 bits: base product", GEMM, "acc = tl.dot(x, w, acc, input_precision=PRECISION)", "acc = tl.dot(x, w, acc, input_precision=PRECISION).to(DTYPE).to(tl.float32)", 0),
    Mutant("16 bits: base product, descriptors", GEMM, "acc = tl.dot(x, w, acc, input_precision=PRECISION)", "acc = tl.dot(x, w, acc, input_precision=PRECISION).to(DTYPE).to(tl.float32)", 1),
    Mutant("16 bits: fused S", GEMM, "s = tl.dot(x, a, s, input_precision=PRECISION)", "s = tl.dot(x, a, s, input_precision=PRECISION).to(DTYPE).to(tl.float32)", 0),
    Mutant("16 bits: fused S, descriptors", GEMM, "s = tl.dot(x, a, s, input_precision=PRECISION)", "s = tl.dot(x, a, s, input_precision=PRECISION).to(DTYPE).to(tl.float32)", 1),
    Mutant("16 bits: S", FORWARD, "acc = tl.dot(x, rows.to(x.dtype), acc, input_precision=PRECISION)", "acc = tl.dot(x, rows.to(x.dtype), acc, input_precision=PRECISION).to(x.dtype).to(tl.float32)"),
    Mutant("16 bits: dB", BACKWARD, "db_t = tl.dot(s_t, dy, db_t, input_precision=PRECISION)", "db_t = tl.dot(s_t, dy, db_t, input_precision=PRECISION).to(DTYPE).to(tl.float32)"),
    Mutant("16 bits: dA", BACKWARD, "da = tl.dot(ds_t, x, da, input_precision=PRECISION)", "da = tl.dot(ds_t, x, da, input_precision=PRECISION).to(DTYPE).to(tl.float32)"),
    Mutant("16 bits: sums of parts", REDUCE, "tl.load(p_part, mask=m_part, other=0.0), axis=0)", "tl.load(p_part, mask=m_part, other=0.0).to(out_ptr.dtype.element_ty).to(tl.float32), axis=0)"),
    # rows in groups
    Mutant("grouped: groups begin a block late", GROUPED, "// size + middle <= number", "// size + middle < number"),
    Mutant("grouped: blocks before the first group are its", GROUPED, "tl.where(first < begin, 0x7FFFFFFF, first)", "first"),
    Mutant("grouped: groups end with the batch", GROUPED, "end = min(tl.load(offsets_ptr + group + 1), M)", "end = M"),
    Mutant("grouped: every block of a group is its first", GROUPED, "begin + (number - begin // size - group) * size", "begin"),
    Mutant("grouped: too few blocks", GROUPED, "m // config.block_m + groups, splits", "m // config.block_m + 1, splits"),
    Mutant("grouped: too few blocks of y", GROUPED, "m // config.block_m + groups, ceil_div", "m // config.block_m + 1, ceil_div"),
    Mutant("grouped: the first group's A", GROUPED, "a_ptr + group.to(tl.int64) * stride_ag", "a_ptr"),
    Mutant("grouped: the first group's B", GROUPED, "up_ptr += group.to(tl.int64) * stride_ug", "up_ptr += 0"),
    Mutant("grouped: the first group's threshold", GROUPED, "threshold = tl.load(thresholds_ptr + group)", "threshold = tl.load(thresholds_ptr)"),
    Mutant("grouped: the first group's threshold for dx", GROUPED, "tl.load(thresholds_ptr + group), first_m", "tl.load(thresholds_ptr), first_m"),
    Mutant("grouped: the first group's factor", GROUPED, "tl.load(scale_ptr + group)", "tl.load(scale_ptr)"),
    Mutant("grouped: the mask of the block's rows", GROUPED, "thresholds_ptr + group), first_m, first_n", "thresholds_ptr + group), 0, first_n"),
    Mutant("grouped: y is overwritten", GROUPED, "(out.to(tl.float32) + term)", "term"),
    Mutant("grouped: y without its pitch", GROUPED, "o_m[:, None] * stride_om", "o_m[:, None] * N"),
    Mutant("grouped: parts of S at one place", GROUPED, "s_ptr + split.to(tl.int64) * M * R, s, end", "s_ptr, s, end"),
    Mutant("grouped: empty groups of dB are left", GROUPED_BACKWARD, "if (first_m >= end) & (first_m != begin):", "if first_m >= end:", 0),
    Mutant("grouped: empty groups of dA are left", GROUPED_BACKWARD, "if (first_m >= end) & (first_m != begin):", "if first_m >= end:", 1),
    Mutant("grouped: a chunk of dy to the end of the group", GROUPED_BACKWARD, "last_m = min(first_m + m_chunk, end)", "last_m = end", 0),
    Mutant("grouped: a chunk of x to the end of the group", GROUPED_BACKWARD, "last_m = min(first_m + m_chunk, end)", "last_m = end", 1),
    Mutant("grouped: a chunk of x to the end of the chunk", GROUPED_BACKWARD, "last_m = min(first_m + m_chunk, end)", "last_m = first_m + m_chunk", 1),
    Mutant("grouped: one part for two chunks", GROUPED_BACKWARD, "2 * (first_m // m_chunk) + (first_m == begin).to(tl.int32)", "2 * (first_m // m_chunk)"),
    Mutant("grouped: every chunk is a result", GROUPED_BACKWARD, "if end - begin <= m_chunk:", "if end > begin - 1:"),
    Mutant("grouped: parts of the first chunks only", GROUPED_BACKWARD, "range(0, chunks_of_group, PARTS)", "range(0, PARTS, PARTS)"),
    Mutant("grouped: the last part is missing", GROUPED_BACKWARD, "(o_chunk < chunks_of_group)", "(o_chunk < chunks_of_group - 1)"),
    Mutant("grouped: the sum of short groups too", GROUPED_BACKWARD, "    if rows <= m_chunk:\n        return\n", ""),
    Mutant("grouped: dB without its factor", GROUPED_BACKWARD, "db_t *= tl.load(scale_ptr + group)", "db_t *= 1.0"),
    Mutant("grouped: dA without its factor", GROUPED_BACKWARD, "da *= tl.load(scale_ptr + group)", "da *= 1.0"),
    Mutant("grouped: dA without its mask", GROUPED_BACKWARD, "drop(x, seed, threshold, m, first_k)", "x"),
    Mutant("grouped: dA with the mask of the chunk's first rows", GROUPED_BACKWARD, "drop(x, seed, threshold, m, first_k)", "drop(x, seed, threshold, first_m, first_k)"),
    Mutant("grouped: dx without its mask", GROUPED_OPS, "group_up_(dx, ds, a.mT, scale, offsets, tiles.up, **named)", "group_up_(dx, ds, a.mT, scale, offsets, tiles.up, precision=precision)"),
    Mutant("grouped: parts of dS at one place", GROUPED_BACKWARD, "ds_ptr += tile.to(tl.int64) * M * R", "ds_ptr += 0"),
    Mutant("grouped: 16 bits in dA", GROUPED_BACKWARD, "da = tl.dot(ds_t, x, da, input_precision=PRECISION)", "da = tl.dot(ds_t, x, da, input_precision=PRECISION).to(DTYPE).to(tl.float32)"),
    Mutant("grouped: 16 bits in dB", GROUPED_BACKWARD, "db_t = tl.dot(s_t, dy, db_t, input_precision=PRECISION)", "db_t = tl.dot(s_t, dy, db_t, input_precision=PRECISION).to(DTYPE).to(tl.float32)"),
    Mutant("grouped: dB always computed", GROUPED_OPS, "needs_db=needs_db,", "needs_db=True,"),
    Mutant("grouped: dB of many ranks in A's order", GROUPED_OPS, '"transposed": True', '"transposed": False'),
    Mutant("grouped: an empty batch is launched", GROUPED_OPS, "if 0 in (x.shape[0], groups):", "if False:", 1),
    Mutant("grouped: outputs with any strides", GROUPED_OPS, "if (columns > 1 and out.stride(1) != 1) or", "if"),
    Mutant("config: one chunk of rows for all groups", CONFIG, "x = fitted(x_config(arch, q))", "x = replace(fitted(x_config(arch, q)), splits=1)"),
    Mutant("config: blocks of 64 rows for groups of one row", CONFIG, "most = max(16, next_power_of_2(ceil_div(q.m, groups)))", "most = 64"),
    # banks of experts
    Mutant("experts: the mask of the first rows for S", EXPERTS, "down_project(x[start:stop], own, start)", "down_project(x[start:stop], own, 0)"),
    Mutant("experts: the mask of the first rows for dA", EXPERTS, "own, part, needs_a, start)", "own, part, needs_a, 0)"),
    Mutant("experts: y without the factor of the mask", EXPERTS, "alpha=own.scale()", "alpha=own.scaling"),
    Mutant("experts: y of few rows without the factor of the mask", EXPERTS, "alpha=low.scale()", "alpha=low.scaling"),
    Mutant("experts: S of few rows without its mask", EXPERTS, "grouped_product(_kept(x, low), a, offsets, groups)", "grouped_product(x, a, offsets, groups)"),
    Mutant("experts: dB of few rows without its factor", EXPERTS, "torch._grouped_mm(dy.T, s, offs=ends).mul_(scale)", "torch._grouped_mm(dy.T, s, offs=ends)"),
    Mutant("experts: dA of few rows without its mask", EXPERTS, "torch._grouped_mm(ds.T, _kept(x, low), offs=ends)", "torch._grouped_mm(ds.T, x, offs=ends)"),
    Mutant("experts: dx of few rows without its mask", EXPERTS, "dx.add_(_kept(update, low), alpha=scale)", "dx.add_(update, alpha=scale)"),
    Mutant("experts: dW of the first expert", EXPERTS, "out=dweight[group]", "out=dweight[0]"),
    Mutant("experts: rows of none are left by a loop", PRODUCTS, "    y[end:].zero_()\n", ""),
    Mutant("experts: rows of none are left by one operation", PRODUCTS, "            y[groups[-1][2] if groups else 0 :].zero_()\n", ""),
    Mutant("experts: kernels without the factor of the mask", TRITON_EXPERTS, "low.scale(), threshold", "low.scaling, threshold"),
    Mutant("experts: one recording for all gradients", TRITON_EXPERTS, "(product_precision(x), *needs)", "(product_precision(x),)"),
    Mutant("experts: one recording for both precisions, forward", TRITON_EXPERTS, "repeat((), product_precision(x), inputs, run)", "repeat((), (), inputs, run)"),
    Mutant("experts: one recording for both precisions, backward", TRITON_EXPERTS, "(product_precision(x), *needs)", "(*needs,)"),
    Mutant("experts: the frozen bank waits for the offsets", EXPERTS, "if needs_w or (low is not None and not triton):", "if needs_w or not triton:"),
    Mutant("mixed: one recording for both precisions, forward", TRITON_MIXED, "settings = product_precision(x), groups.places\n", "settings = groups.places\n"),
    Mutant("mixed: one recording for both precisions, backward", TRITON_MIXED, "product_precision(x), groups.places, needs_x", "groups.places, needs_x"),
    Mutant("mixed: kernels with several seeds", MIXED, "any(seed is not seeds[0] for seed in seeds)", "False"),
    Mutant("experts: no threshold", TRITON_EXPERTS, "threshold = dropout_threshold(low.p)", "threshold = 1"),
    # gated MLPs
    Mutant("gated: SiLU for GELU by tanh", GATED, 'if ACTIVATION == "gelu_tanh"', 'if ACTIVATION == "no"'),
    Mutant("gated: the slope of GELU without its density", GATED, "cumulative + g * density", "cumulative"),
    Mutant("gated: the slope of tanh's argument", GATED, "0.134145 * g", "0.044715 * g"),
    Mutant("gated: the slope of the sigmoid", GATED, "(e * inverse * inverse)", "(e * inverse)"),
    Mutant("gated: the sigmoid of negative numbers", GATED, "tl.where(z < 0, e, 1.0) * inverse", "inverse"),
    Mutant("gated: dg without u", GATED, "dh * u * slope", "dh * slope"),
    Mutant("gated: du without act", GATED, "(dh * act)", "dh"),
    Mutant("gated: h without u", GATED, "(act * u).to(DTYPE)", "act.to(DTYPE)"),
    Mutant("gated: the product without u", GATED, "(act * u).to(h_ptr.dtype.element_ty)", "act.to(h_ptr.dtype.element_ty)"),
    Mutant("gated: dh without the adapter", GATED, "if R > 0:", "if R < 0:"),
    Mutant("gated: dh without its mask", GATED, "R, DTYPE, DROPOUT, PRECISION, BLOCK_R,", "R, DTYPE, False, PRECISION, BLOCK_R,"),
    Mutant("gated: the mask of the first rows", GATED, "stride_bits, first_m, first_n, BLOCK_M", "stride_bits, 0, first_n, BLOCK_M"),
    Mutant("gated: A in the wrong order", GATED, "lora_a.stride(1)", "lora_a.stride(0)"),
    Mutant("gated: rows beyond the last", GATED, "(o_m < M)[:, None] & (o_n < N)[None, :]", "(o_m < M + 1)[:, None] & (o_n < N)[None, :]"),
    Mutant("gated: columns beyond the last", GATED, "(o_m < M)[:, None] & (o_n < N)[None, :]", "(o_m < M)[:, None] & (o_n < N + 1)[None, :]"),
    Mutant("gated: dh without the factor", TRITON_GATED, "scale=low.scale(), bits=bits,", "scale=1.0, bits=bits,"),
    Mutant("gated: one recording for all activations", TRITON_GATED, '"gated", activation, low.scaling', '"gated", low.scaling'),
    Mutant("gated: one recording for all products", TRITON_GATED, '("gated", activation)', '("gated",)'),
    Mutant("gated: dg without u in torch", GATED_OPS, "backward_(dh.mul_(u), g)", "backward_(dh, g)"),
    Mutant("gated: du without act in torch", GATED_OPS, "du = a.mul_(dh)", "du = dh.clone()"),
    Mutant("gated: GELU by tanh is exact", GATED_OPS, '_gelu("tanh")', '_gelu("none")'),
    Mutant("gated: the seed of gate for down", GATED_OPS, "else seeds[1], seeds[2]]", "else seeds[1], seeds[0]]"),
    Mutant("gated: one mask for all", ROWS, "(0.0, 0) if low.seed is None else (low.p, id(low.seed))", "(0.0, 0)"),
    Mutant("gated: hooks of the layers are ignored", BLOCKS, "if any(why_not_gated(layer) is not None for layer in layers):", "if False:"),
    Mutant("gated: hooks of the activation are ignored", BLOCKS, "or any(map(has_hooks, other.modules()))", ""),
    Mutant("gated: any activation", BLOCKS, "type(other) is not kind or", ""),
    Mutant("gated: any settings", BLOCKS, "return _has_settings(module, block.settings)", "return True"),
    Mutant("gated: settings of the module alone", BLOCKS, "children += child.named_modules(prefix=name)", "pass"),
    Mutant("gated: any precision", BLOCKS, "precision_of(x) not in block.precisions or", ""),
    Mutant("gated: any forward of the class", BLOCKS, "kind.forward is checked and", ""),
    Mutant("gated: any input is taken", BLOCKS, "if not _fit(x, weights):", "if False:"),
    Mutant("gated: seeds in another order", BLOCKS, "(1, 0) if block.up_first else (0, 1)", "(0, 1)"),
    Mutant("gated: masks of their own for gate and up", BLOCKS, "seeds[i] = seeds[first]", "seeds[i] = up._draw_seed(x)"),
    Mutant("gated: disabled adapters are used", BLOCKS, "and not la.disabled else None", "else None"),
    Mutant("gated: a frozen start is a block", BLOCKS, "x.requires_grad or any(map(_trains, layers[:2]))", "True"),
    Mutant("gated: gate and up are no group", FUSION, "if share_a_mask(gate, up):", "if False:"),
    Mutant("gated: no proof in training mode", SEARCH, "            one.training = training\n", "            one.training = False\n"),
    Mutant("gated: no proof in other modes", SEARCH, "itertools.product((x, noise), _MODES)", "itertools.product((x, noise), (_EVAL, _TRAINING))"),
    Mutant("gated: no proof for large inputs", SEARCH, "for s in _SIZES]", "for s in _SIZES[:1]]"),
    Mutant("gated: no proof for infinite inputs", SEARCH, "[infinite, *resized]", "resized"),
    Mutant("gated: no proof of gradients", SEARCH, "if not mode.gradients or all(map(_equal, received, wanted)):", "if True:"),
    Mutant("gated: any output", SEARCH, "if run.y is not down.given or down.given._version", "if down.given._version"),
    Mutant("gated: any version of the output", SEARCH, "or down.given._version != down.versions[1]", ""),
    Mutant("gated: any state", SEARCH, "if any(call.state != run.state", "if False and any(call.state != run.state"),
    Mutant("gated: any version of the input", SEARCH, " or run.x._version:", ":"),
    Mutant("gated: hooks of tensors are ignored", SEARCH, "if any(tensor._backward_hooks for tensor in tensors):", "if False:"),
    Mutant("gated: random numbers are drawn", SEARCH, "if not _same_random_state(states, _random_state()):", "if False:"),
    Mutant("gated: attributes are set", SEARCH, "if _contents(attributes) != contents:", "if False:"),
    Mutant("gated: lists are changed", SEARCH, "isinstance(value, (list, set, dict, deque))", "False"),
    Mutant("gated: tensors are changed", SEARCH, "found.append((value._version,))", "pass"),
    Mutant("gated: no proof for other numbers of rows", SEARCH, "[infinite, *resized]", "[infinite]"),
    Mutant("gated: the product overlaps the pass before it", TRITON_GATED, "replace(config.split, overlap=False)", "config.split"),
    Mutant("gated: more ranks than a tile holds", GATED, "if r > config.block_r:", "if False:"),
    Mutant("gated: dropout stays 0", SEARCH, "            layer.dropout = p\n", "            pass\n"),
    Mutant("gated: autocast was not tried", SEARCH, "torch.autocast(device, dtype, enabled=dtype is not None)", "torch.autocast(device, dtype, enabled=False)"),
    Mutant("gated: S without its mask", GATED, "h = drop(h, tl.load(seed_ptr), threshold, first_m, n)", "h = h"),
    Mutant("gated: S with the mask of the first columns", GATED, "threshold, first_m, n)", "threshold, first_m, first_n)"),
    Mutant("gated: S of the first columns of A", GATED, "o_r.to(tl.int64)[None, :] * stride_ar + o_n[:, None]", "o_r.to(tl.int64)[None, :] * stride_ar + (o_n - n)[:, None]"),
    Mutant("gated: parts of S at one place", GATED, "s_ptr + split.to(tl.int64) * M * R, s", "s_ptr, s"),
    Mutant("gated: h is not stored", GATED, "        tl.store(h_ptr + o, h, mask=mask)\n        if DROPOUT", "        if DROPOUT"),
    Mutant("gated: S of the mask without its seed", TRITON_GATED, '"mask": mask_of(g, low)', '"mask": mask_of(g, low)._replace(threshold=1)'),
    Mutant("gated: few rows by one call", DISPATCH, 'return None if choice.plan == "decode" else choice', "return choice"),
    Mutant("gated: ranks of gate alone", DISPATCH, "max(gate + up, down), forced", "max(gate, down), forced"),
    # launches
    Mutant("launch: the grid's second dimension is lost", LAUNCH, "x, y, z = (*grid, 1, 1)[:3]", "x, y, z = grid[0], 1, 1"),
    Mutant("launch: alignment ignored", LAUNCH, "append(value.data_ptr() % 16 == 0)", "append(True)"),
    Mutant("launch: dtype ignored", LAUNCH, "append(value.dtype)", "append(None)"),
    Mutant("launch: tile of a descriptor ignored", LAUNCH, "append(value.block_shape)", "append(None)"),
    Mutant("launch: dtype of a descriptor ignored", LAUNCH, "append(value.base.dtype)", "append(None)"),
    Mutant("launch: an integer of 1 is like any other", LAUNCH, "(value == 1, value % 16 == 0, wide)", "(value % 16 == 0, wide)"),
    Mutant("launch: multiples of 16 are like any other", LAUNCH, "(value == 1, value % 16 == 0, wide)", "(value == 1, wide)"),
    Mutant("launch: width of integers ignored", LAUNCH, "wide = value >= _INT32", "wide = False"),
    Mutant("launch: integers that are not specialised are", LAUNCH, "if specialised else wide", "if True else wide"),
    Mutant("launch: constants ignored", LAUNCH, "            append(value)\n", "            append(None)\n"),
    Mutant("launch: one table for all devices", LAUNCH, "key = (number, device,", "key = (number, 0,"),
    Mutant("launch: pipeline stages ignored", LAUNCH, "num_warps, num_stages, launch_pdl, *_traits", "num_warps, launch_pdl, *_traits"),
    Mutant("launch: overlap ignored", LAUNCH, "num_stages, launch_pdl, *_traits", "num_stages, *_traits"),
    Mutant("launch: arguments in the order of the call", LAUNCH, "values = [arguments[name] for name, _, _ in parameters]", "values = [*arguments.values()]"),
    Mutant("launch: always by Triton", LAUNCH, "        _compiled[key] = compiled\n", "        pass\n"),
    Mutant("launch: a profiler's hooks are ignored", LAUNCH, "    if native.is_profiled():", "    if False:"),
    # repeated calls
    Mutant("recording: dtype ignored", RECORDING, "key += (tensor.dtype, tensor.shape,", "key += (tensor.shape,"),
    Mutant("recording: strides ignored", RECORDING, "tensor.stride(), address % 16 == 0)", "address % 16 == 0)"),
    Mutant("recording: alignment ignored", RECORDING, "tensor.stride(), address % 16 == 0)", "tensor.stride())"),
    Mutant("recording: settings ignored", RECORDING, "[*map(id, choices), settings, inputs[0].device]", "[*map(id, choices), inputs[0].device]"),
    Mutant("recording: choice ignored", RECORDING, "[*map(id, choices), settings, inputs[0].device]", "[settings, inputs[0].device]"),
    Mutant("recording: inputs that are missing are like others", RECORDING, "key.append(None)", "pass"),
    Mutant("recording: offsets ignored", RECORDING, "return slot, address - one.data_ptr()", "return slot, 0"),
    Mutant("recording: unknown tensors are the first input", RECORDING, "        self.known = False\n        return 0, 0", "        return 0, 0"),
    Mutant("recording: views are what they are views of", RECORDING, "        return View(slot, offset", "        return slot or (slot, offset"),
    Mutant("recording: views begin at the start", STEPS, "base.storage_offset() + self.offset", "base.storage_offset()"),
    Mutant("recording: tensors at one address are told apart no more", RECORDING, "        key += map(addresses.index, addresses)", "        pass"),
    Mutant("recording: the workspace is shared always", RECORDING, "lives[s][0] <= end and begin <= lives[s][1]", "False"),
    Mutant("recording: the workspace is shared a step early", RECORDING, "lives[s][0] <= end and begin <= lives[s][1]", "lives[s][0] < end and begin < lives[s][1]"),
    Mutant("recording: the workspace is never shared", RECORDING, "lives[s][0] <= end and begin <= lives[s][1]", "True"),
    Mutant("recording: the tensors of the first call are kept", STEPS, "            values[place.position] = None", "            pass"),
    Mutant("recording: one recorder for all threads", RECORDING, "_local = threading.local()", "_local = type('', (), {})()"),
    Mutant("recording: the first call is recorded", RECORDING, "        _seen[known] = choices\n        return run()", "        pass"),
    Mutant("recording: nothing is recorded", RECORDING, "recorder.recording(outputs) or _UNREPEATABLE", "_UNREPEATABLE"),
    Mutant("recording: allocated like an input that is not contiguous", RECORDING, "            if one.is_contiguous():\n", "            if True:\n"),
    Mutant("recording: allocated like an input of another dtype", RECORDING, "(one.shape, one.dtype, one.device) != form", "(one.shape, made.dtype, one.device) != form"),
    Mutant("native: a profiler's hooks are ignored", STEPS, "if not is_profiled():", "if True:"),
    Mutant("native: offsets of addresses ignored", STARTS, "addresses[i] + place->offset", "addresses[i]"),
    Mutant("native: tensor maps of the recorded call", STARTS, "replace_address((CUtensorMap *)(data + place->at), (void *)address)", "CUDA_SUCCESS"),
    Mutant("native: every launch has the first one's addresses", STARTS, "    found += program->launch[i].places;\n  }\n  Py_END", "  }\n  Py_END"),
    Mutant("native: overlap ignored", STARTS, "config->numAttrs = overlaps;", "config->numAttrs = 0;"),
    Mutant("native: shared memory ignored", NATIVE, "        shared,\n        bool", "        0,\n        bool"),
    Mutant("native: one warp", NATIVE, "_WARP * warps", "_WARP"),
    Mutant("native: no scratch memory", NATIVE, "[*parameters, scratch, scratch]", "parameters"),
    Mutant("native: sizes of a tensor map as strides", NATIVE, 'struct.pack("q", stride), None) for stride in strides', 'struct.pack("q", stride), None) for stride in sizes'),
    Mutant("recording: never forgotten", RECORDING, "        _recordings.clear()\n    recorder", "        pass\n    recorder"),
    Mutant("recording: calls that came once are never forgotten", RECORDING, "            _seen.clear()\n        _seen[known]", "            pass\n        _seen[known]"),
    Mutant("recording: calls that come once displace recordings", RECORDING, "            _seen.clear()\n        _seen[known]", "            forget()\n        _seen[known]"),
    # operators and autograd
    Mutant("ops: keep scale", REFERENCE, "self.scaling * self.keep_scale()", "self.scaling"),
    Mutant("ops: S of torch with a factor", OPS, "s / low.keep_scale()", "s"),
    Mutant("ops: dB of torch without the keep scale", OPS, "db = (low.scale() * (dy.T @ s))", "db = (low.scaling * (dy.T @ s))"),
    Mutant("ops: gradients in a different order", OPS, "gradient in (dx, da, db)", "gradient in (da, dx, db)"),
    Mutant("ops: fused A in its own dtype", OPS, "if not is_loadable(lora_a, x.dtype):", "if not is_loadable(lora_a, lora_a.dtype):"),
    Mutant("ops: A at any address", PRODUCTS, " and matrix.data_ptr() % 16 == 0", ""),
    Mutant("ops: non-contiguous bias", OPS, "if bias is not None and not bias.is_contiguous():", "if False:"),
    Mutant("ops: dB of many ranks without its factor", PRODUCTS, ".mul_(scale)[None]", "[None]"),
    Mutant("ops: dB always computed", OPS, "needs_db=needs_db", "needs_db=True"),
    Mutant("ops: dx always computed", OPS, "with_dx = needs_x and joins(choice, low)", "with_dx = joins(choice, low)", 0),
    Mutant("ops: columns of dy for the mask of x", OPS, "columns=x.shape[1]", "columns=dy.shape[1]"),
    Mutant("ops: dtypes of the gradients swapped", OPS, "(low.a.dtype, low.b.dtype)", "(low.b.dtype, low.a.dtype)"),
    Mutant("group: one factor for all", GROUP, "if len({one.scaling for one in lows}) == 1:", "if True:"),
    Mutant("group: no factor for any", GROUP, "low = low._replace(scaling=lows[0].scaling)", "pass"),
    Mutant("group: mask of the last layer", GROUP, "bits = mask if first else bits", "bits = mask"),
    Mutant("group: dx of the first layer only", GROUP, "dx = library(add_backward, dx, dy, layer.weight)", "pass"),
    Mutant("group: the first layer's dy twice", GROUP, "added = 0 if dx is not None else 1", "added = 0"),
    Mutant("group: the first layer's dy never", GROUP, "added = 0 if dx is not None else 1", "added = 1"),
    Mutant("group: dx always computed", GROUP, "with_dx = needs_x and joins(choice, low)", "with_dx = joins(choice, low)"),
    Mutant("group: dB under the first layer's scaling", GROUP, "dy, x, s[i], layer.low, needs_ds", "dy, x, s[i], layer.low._replace(scaling=lows[0].scaling), needs_ds"),
    Mutant("group: S of the wrong columns", GROUP, "first += rank", "first += 0"),
    Mutant("group: repeated with other factors", GROUP, "tuple((low.scaling, low.p) for _, _, low in layers)", "()"),
    Mutant("group: repeated with other needs", GROUP, "settings = _settings(layers), needs, tuple(needs_b)", "settings = _settings(layers)"),
    Mutant("linear: gradients in a different order", LINEAR, "wanted = (needs_x, needs_a, needs_b)", "wanted = (needs_x, needs_b, needs_a)"),
    Mutant("config: fused float32 of too many ranks", CONFIG, "return 16 if precision == \"ieee\" else 32", "return 64"),
    Mutant("config: block of S smaller than the rank", CONFIG, "max(16, next_power_of_2(rank))", "max(16, next_power_of_2(rank) // 2)"),
    Mutant("config: powers of two rounded down", CONFIG, "1 << (number - 1).bit_length()", "1 << (number.bit_length() - 1)"),
    Mutant("config: decode's inner blocks below 16", CONFIG, "block_k = max(16, block_k // 4)", "block_k = block_k // 4"),
    Mutant("config: start's tile of B for few ranks", CONFIG, "4096 // config.block_r", "4096 // 16"),
    # the tuner
    Mutant("tune: noise counts", TUNE, "if new < _GAIN * time", "if new < time"),
    Mutant("tune: on from the first tiles", TUNE, "best, time, options = option, new, neighbours(option)", "best, time = option, new"),
    Mutant("tune: from the slower tiles", TUNE, "if new < _GAIN * time", "if new > _GAIN * time"),
    Mutant("tune: one candidate too many", TUNE, "while len(tried) < limit", "while len(tried) <= limit"),
    Mutant("tune: tiles tried twice", TUNE, "if o not in tried and _sensible(o)", "if _sensible(o)"),
    Mutant("tune: wrong kernels are timed", TUNE, "time = timer(run) if bench.attempt(run) else math.inf", "time = timer(run)"),
    Mutant("tune: any mask is right", BENCH, "same = self.keep is not None and torch.equal(kept, self.keep)", "same = True"),
    Mutant("tune: overlap where it is slower", TUNE, "if after < before", "if after > before"),
)  # fmt: skip


def tests_of(mutants: Iterable[Mutant]) -> list[str]:
    """The test files that must detect the mutants."""
    return sorted({test for m in mutants for test in TESTS.get(m.file, KERNEL_TESTS)})


def run(root: Path, tests: Sequence[str]) -> bool:
    """Whether these tests pass on the project at `root`. The slow ones come last: most mutants are detected before."""
    return all(_passes(root, tests, marked) for marked in ("not slow", "slow"))


def _passes(root: Path, tests: Sequence[str], marked: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marked]
    environment = dict(os.environ, PYTHONPATH=str(root), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    outcome = subprocess.run(
        [*command, *tests], cwd=root, env=environment, capture_output=True, text=True
    )
    # A wrong address can crash the interpreter; an exit by a signal (a negative code) counts as a failed test.
    if outcome.returncode > 1 and outcome.returncode != NO_TESTS:
        raise SystemExit(f"pytest could not run:\n{outcome.stdout}{outcome.stderr}")
    return outcome.returncode in (0, NO_TESTS)


def copy_to(folder: Path) -> Path:
    """Copy the parts of the project that the tests need into the folder, and return it."""
    for name in ("fastlora", "kernels", "tests", "docs"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "medical"),
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def detected(mutant: Mutant) -> tuple[bool, float]:
    """Whether the tests fail on the mutant, and the seconds they took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = copy_to(Path(folder))
        mutant.apply(root)
        return not run(root, tests_of([mutant])), time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="mutants tested in parallel (default: number of cores)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="test only mutants whose name contains one of the texts",
    )
    arguments = parser.parse_args(argv)
    mutants = [m for m in MUTANTS if any(text in m.name for text in arguments.only)]
    with tempfile.TemporaryDirectory() as folder:
        if not run(copy_to(Path(folder)), tests_of(mutants)):
            print("the unchanged project fails its tests")
            return 2
    missed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, (found, seconds) in zip(mutants, pool.map(detected, mutants), strict=True):
            print(
                f"{'detected' if found else 'MISSED  '} {seconds:6.1f} s  {mutant.name}",
                flush=True,
            )
            missed += [] if found else [mutant.name]
    print(f"{len(mutants) - len(missed)} of {len(mutants)} mutants detected")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
