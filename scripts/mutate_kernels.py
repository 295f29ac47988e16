"""Mutation tests of the kernels: change the source in one place at a time and check that a test fails.

    python scripts/mutate_kernels.py [--jobs 2] [--only TEXT]

A mutant is a copy of the project with one piece of source replaced. The kernel tests run on it in Triton's interpreter, and the
mutant is detected if they fail. Exit code 0: all mutants were detected; 1: some were not; 2: the unchanged project fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/kernels/test_kernels.py",
    "tests/ops/test_triton_ops.py",
    "tests/ops/test_dispatch.py",
)


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
OPS, LINEAR = "fastlora/ops/triton_ops.py", "fastlora/ops/linear.py"
REFERENCE = "fastlora/ops/reference.py"

MUTANTS = (
    # the mask
    Mutant("philox: nine rounds", MASK, "zero, zero)", "zero, zero, n_rounds=9)"),
    Mutant("philox: row and column swapped", MASK, "seed, c0, c1", "seed, c1, c0"),
    Mutant("philox: a different key", MASK, "tl.philox(seed,", "tl.philox(seed ^ 1,"),
    Mutant("mask: words in a different order", MASK, "_two(w0, least) | _two(w1, least) << 2", "_two(w1, least) | _two(w0, least) << 2"),
    Mutant("mask: a word at a different place", MASK, "_two(w3, least) << 6", "_two(w3, least) << 5"),
    Mutant("mask: unsigned low half", MASK, "((word << 16) >> 16 >= least)", "((word & 0xFFFF) >= least)"),
    Mutant("mask: halves swapped", MASK, "((word << 16) >> 16 >= least).to(tl.int32) | ((word >> 16", "(word >> 16 >= least).to(tl.int32) | ((word << 16 >> 16"),
    Mutant("mask: > for >=", MASK, "(word << 16) >> 16 >= least", "(word << 16) >> 16 > least"),
    Mutant("mask: the threshold's offset", MASK, "threshold - 32768", "threshold - 32767"),
    Mutant("mask: the next group of columns", MASK, "first_col // 8 +", "first_col // 8 + 1 +"),
    Mutant("mask: the tile's row is ignored", MASK, "o_row = first_row +", "o_row = 0 * first_row +"),
    Mutant("mask: dropped by multiplication", MASK, "tl.where(tl.reshape(eights, block.shape) != 0, block, 0.0)",
           "tl.reshape(eights, block.shape).to(block.dtype) * block"),
    Mutant("bits: a different order", MASK, ">> tl.arange(0, 8)", ">> (7 - tl.arange(0, 8))"),
    # the order of tiles
    Mutant("tiles: group width", TILES, "(pid // width) * GROUP_M", "(pid // width)"),
    Mutant("tiles: rows of the last group", TILES, "min(num_m - first_m, GROUP_M)", "GROUP_M"),
    Mutant("tiles: halves interleaved", TILES, "[block.shape[0], 2, block.shape[1] // 2]", "[block.shape[0], block.shape[1] // 2, 2]"),
    # the main GEMM
    Mutant("gemm: stride of x", GEMM, "[None, :] * stride_xk", "[None, :] * stride_xm"),
    Mutant("gemm: step of W", GEMM, "p_w += step * stride_wk", "p_w += step * stride_wn"),
    Mutant("gemm: inner dimension unmasked", GEMM, "x = tl.load(p_x, mask=m_k[None, :], other=0.0)", "x = tl.load(p_x)"),
    Mutant("gemm: rows past the end stored", GEMM, "mask=(o_m < M)[:, None] & (o_n < N)[None, :]", "mask=(o_m < M + 1)[:, None] & (o_n < N)[None, :]", 0),
    Mutant("gemm: first block of ranks only", GEMM, "for first_r in range(0, R, BLOCK_R)", "for first_r in range(0, BLOCK_R, BLOCK_R)"),
    Mutant("gemm: ranks unmasked", GEMM, "m_r = o_r < R", "m_r = o_r < R + 1"),
    Mutant("gemm: no mask on the rank term", GEMM, "term = acc + drop(term, tl.load(mask_ptr), threshold, first_m, first_n)", "term = acc + term"),
    Mutant("gemm: bits of a different row", GEMM, "mask_ptr + o_m[:, None] * stride_mask", "mask_ptr + o_m[:, None] * (N // 8)"),
    Mutant("gemm: bits of different columns", GEMM, "o_byte = first_n // 8 +", "o_byte = 0 * first_n +"),
    Mutant("bits: written at the first block's position", BACKWARD, "o_byte = first_k // 8 +", "o_byte = 0 * first_k +"),
    Mutant("gemm: mask of a different column", GEMM, "threshold, first_m, first_n)", "threshold, first_m, first_n + 8)"),
    Mutant("gemm: S without its factor", GEMM, "s_low = (s * scale)", "s_low = (s)", 0),
    Mutant("gemm: S without its factor, descriptors", GEMM, "s_low = (s * scale)", "s_low = (s)", 1),
    Mutant("gemm: S not stored", GEMM, "if FUSED and tile_n == 0", "if FUSED and tile_n == 1", 0),
    Mutant("gemm: S not stored, descriptors", GEMM, "if FUSED and tile_n == 0", "if FUSED and tile_n == 1", 1),
    Mutant("gemm: no bias", GEMM, "HAS_BIAS\": bias is not None", "HAS_BIAS\": False"),
    Mutant("gemm: bias of the first columns", GEMM, "o_n = first_n + tl.arange(0, acc.shape[1])\n    return", "o_n = tl.arange(0, acc.shape[1])\n    return"),
    Mutant("gemm: second strip at the first's position", GEMM, "first_n + acc.shape[1] // 2", "first_n"),
    Mutant("gemm: persistent stride", GEMM, "tl.num_programs(0)", "tl.num_programs(0) + 1"),
    Mutant("gemm: update overwrites instead of adding", GEMM, "acc = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)", "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"),
    # the forward passes
    Mutant("S: factor", FORWARD, "s_ptr + split.to(tl.int64) * M * R, s * scale", "s_ptr + split.to(tl.int64) * M * R, s"),
    Mutant("S: chunk starts at 0", FORWARD, "first_k = split * k_chunk", "first_k = 0", 0),
    Mutant("S: mask column of the first block", FORWARD, "threshold, first_m, k)", "threshold, first_m, first_k)"),
    Mutant("S: step of A", FORWARD, "p_rows += step * stride_k", "p_rows += step"),
    Mutant("decode: one split is missing", FORWARD, "for _ in range(splits)", "for _ in range(splits - 1)"),
    Mutant("decode: S without its factor", FORWARD, "low = (s * scale)", "low = (s)"),
    Mutant("decode: W dropped out too", FORWARD, "0, tile * BLOCK_N, False,", "0, tile * BLOCK_N, DROPOUT,"),
    Mutant("decode: tiles of A", FORWARD, "first_r = (tile - w_tiles) * BLOCK_N", "first_r = (tile - w_tiles + 1) * BLOCK_N"),
    # the backward passes
    Mutant("dS: factor", BACKWARD, "(ds * scale)", "(ds)"),
    Mutant("dS: partial sum of a different tile", BACKWARD, "ds_ptr += tile.to(tl.int64) * M * R", "ds_ptr += 0 * M * R"),
    Mutant("dS, dB: rows of one block", BACKWARD, "for m in range(first_m, min(first_m + m_chunk, M), BLOCK_M)", "for m in range(first_m, min(first_m + BLOCK_M, M), BLOCK_M)", 0),
    Mutant("dB: partial sum of a different split", BACKWARD, "db_ptr + split.to(tl.int64) * N * R", "db_ptr + 0 * N * R"),
    Mutant("dB: reset with every block", BACKWARD, "tl.dot(tl.trans(dy), s, db, input", "tl.dot(tl.trans(dy), s, input"),
    Mutant("dS, dB: rows past the end", BACKWARD, "m_m = o_m < M\n        m_row", "m_m = o_m < M - 1\n        m_row"),
    Mutant("dB: ranks past the end", BACKWARD, "m_nr = m_n[:, None] & m_r[None, :]", "m_nr = m_n[:, None] & (o_r < R + 1)[None, :]"),
    Mutant("dS, dB: chunk of rows", BACKWARD, "first_m = split * m_chunk", "first_m = 0", 0),
    Mutant("dA: chunk of rows", BACKWARD, "first_m = split * m_chunk", "first_m = 0", 1),
    Mutant("dA: mask row", BACKWARD, "threshold, m + tl.arange(0, BLOCK_M), o_byte", "threshold, first_m + tl.arange(0, BLOCK_M), o_byte"),
    Mutant("dA: no dropout", BACKWARD, "DROPOUT=mask.drops", "DROPOUT=False"),
    Mutant("sums: the last partial sum is missing", REDUCE, "first + o_split < splits", "first + o_split < splits - 1"),
    Mutant("sums: the first partial sums only", REDUCE, "for first in range(0, splits, SPLITS)", "for first in range(0, SPLITS, SPLITS)"),
    Mutant("sums: the wrong stride", REDUCE, "(first + o_split)[:, None] * size", "(first + o_split)[:, None] * (size - 1)"),
    # operators and autograd
    Mutant("ops: keep scale", REFERENCE, "self.scaling * keep_scale(self.p)", "self.scaling"),
    Mutant("ops: gradients in a different order", OPS, "gradient in (dx, da, db)", "gradient in (da, dx, db)"),
    Mutant("ops: fused A in its own dtype", OPS, "lora_a = low.a.to(x.dtype)", "lora_a = low.a"),
    Mutant("ops: non-contiguous bias", OPS, "bias.contiguous()", "bias"),
    Mutant("ops: dS of many ranks without its factor", OPS, "beta=0, alpha=low.scale()", "beta=0"),
    Mutant("ops: dB always computed", OPS, "needs_db=needs_db", "needs_db=True"),
    Mutant("group: every layer shares S, whatever its scaling", OPS, "sharing.setdefault(layers[i].low.scaling, [])", "sharing.setdefault(layers[0].low.scaling, [])"),
    Mutant("group: dx of the first layer only", OPS, "dx.addmm_(dy, layer.weight)", "dx.addmm_(dy, layer.weight, alpha=0)"),
    Mutant("group: dS under the first layer's scaling", OPS, "dy, s_i, low, needs_x", "dy, s_i, low._replace(scaling=layers[0].low.scaling), needs_x"),
    Mutant("linear: gradients in a different order", LINEAR, "wanted = (needs_x, needs_a, needs_b)", "wanted = (needs_x, needs_b, needs_a)"),
    Mutant("config: fused float32 of too many ranks", CONFIG, "return 16 if precision == \"ieee\" else 32", "return 64"),
    Mutant("config: block of S smaller than the rank", CONFIG, "max(16, 1 << (rank - 1).bit_length())", "max(16, 1 << (rank.bit_length() - 1))"),
)  # fmt: skip


def run(root: Path) -> bool:
    """Whether the kernel tests pass on the project at `root`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    environment = dict(os.environ, PYTHONPATH=str(root), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    outcome = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    # A wrong address can crash the interpreter; an exit by a signal (a negative code) counts as a failed test.
    if outcome.returncode > 1:
        raise SystemExit(f"pytest could not run:\n{outcome.stdout}{outcome.stderr}")
    return outcome.returncode == 0


def copy_to(folder: Path) -> Path:
    """Copy the parts of the project that the kernel tests need into the folder, and return it."""
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
    """Whether the kernel tests fail on the mutant, and the seconds they took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = copy_to(Path(folder))
        mutant.apply(root)
        return not run(root), time.perf_counter() - start


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
        "--only", default="", metavar="TEXT", help="test only mutants whose name contains TEXT"
    )
    arguments = parser.parse_args(argv)
    mutants = [m for m in MUTANTS if arguments.only in m.name]
    with tempfile.TemporaryDirectory() as folder:
        if not run(copy_to(Path(folder))):
            print("the unchanged project fails its kernel tests")
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
