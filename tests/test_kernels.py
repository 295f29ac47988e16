"""Triton helpers: run by the interpreter against the reference, and compiled for real devices without one."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from fastlora import reference
from fastlora.kernels.tiles import keep_block


@triton.jit
def _write_mask(
    out_ptr,
    seed_ptr,
    threshold,
    first_row,
    first_group,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    o_row, o_group = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_G)
    keep = keep_block(tl.load(seed_ptr), threshold, first_row + o_row, first_group + o_group)
    o_col = tl.arange(0, 8 * BLOCK_G)
    tl.store(out_ptr + o_row[:, None] * (8 * BLOCK_G) + o_col[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 99, -(2**63)])
def test_the_mask_is_the_references_bit_for_bit(seed, p):
    rows, groups, first_row, first_group = 16, 4, 37, 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(rows, 8 * groups, dtype=torch.int8, device=device)
    _write_mask[(1,)](
        out,
        torch.tensor(seed, device=device),
        reference.dropout_threshold(p),
        first_row,
        first_group,
        rows,
        groups,
    )
    whole = reference.keep_mask(seed, p, rows, 8 * (first_group + groups), first_row)
    assert torch.equal(out.bool().cpu(), whole[:, 8 * first_group :])


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.test_kernels import _write_mask
signature = {"out_ptr": "*i8", "seed_ptr": "*i64", "threshold": "i32", "first_row": "i32", "first_group": "i32",
             "BLOCK_M": "constexpr", "BLOCK_G": "constexpr"}
source = ASTSource(_write_mask, signature, {"BLOCK_M": 64, "BLOCK_G": 8})
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
assert len(compiled.asm["cubin"]) > 0
print("spills", compiled.asm["ptx"].count(".local"))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_mask_compiles_for_real_devices_without_spilling(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "spills 0"
