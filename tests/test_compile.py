"""The compile gate: every kernel builds for GPUs that are not here, within their limits, and the gate can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compile_kernels as gate  # noqa: E402


@pytest.mark.parametrize("arch", gate.ARCHES)
def test_every_kernel_compiles_within_the_limits_of(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/compile_kernels.py", "--arch", str(arch)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for problem in gate.problems_of(arch):
        assert problem.name in run.stdout


@pytest.mark.parametrize("arch", gate.ARCHES)
def test_the_record_holds_every_problem(arch):
    record = json.loads(gate.file(arch).read_text())
    assert record["architecture"] == f"sm_{arch}"
    assert set(record["kernels"]) == {p.name for p in gate.problems_of(arch)}
    for problem in gate.problems_of(arch):
        for kernel, row in record["kernels"][problem.name].items():
            assert gate.failures(arch, problem, {"kernel": kernel, **row}) == []


def test_hopper_uses_its_matrix_and_copy_engines():
    """wgmma and bulk copies in the large product of sm_90; asynchronous copies before it."""
    kernels = json.loads(gate.file(90).read_text())["kernels"]
    rows = kernels[gate.PROBLEMS[0].name]
    large = [row for name, row in rows.items() if name.startswith("descriptor")]
    assert len(large) == 2 and all(r["bulk_copies"] and r["tensor_core"] for r in large)
    before = json.loads(gate.file(80).read_text())["kernels"][gate.PROBLEMS[0].name]
    large = [row for name, row in before.items() if name.startswith("pointer")]
    assert len(large) == 2 and all(r["async_copies"] and r["tensor_core"] for r in large)


GOOD = {
    "kernel": "pointer",
    "registers": 100,
    "spills": 0,
    "shared": 100_000,
    "tensor_memory": 0,
    "instructions": 1000,
    "tensor_core": 8,
    "wide_multiplications_in_loops": 2,
}
HALF = gate.Problem("split", 64, 64, 64, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "3 spill instructions"),
        ({"shared": 300_000}, "300000 bytes of shared memory, the device has 232448"),
        ({"tensor_memory": 1024}, "1024 columns of tensor memory"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
    ],
)
def test_what_a_device_cannot_run_fails(change, message):
    assert gate.failures(90, HALF, GOOD) == []
    assert gate.failures(90, HALF, GOOD | change) == [message]


def test_exact_float32_and_plain_sums_need_no_tensor_core():
    exact = gate.Problem("split", 64, 64, 64, 4, dtype="float32", precision="ieee")
    assert gate.failures(90, exact, GOOD | {"tensor_core": 0}) == []
    assert gate.failures(90, HALF, GOOD | {"tensor_core": 0, "kernel": "sum"}) == []


def test_what_got_worse_than_the_record_fails():
    assert gate.compare(GOOD, GOOD | {"instructions": 1030}) == []
    assert gate.compare(GOOD, GOOD | {"instructions": 1031}) == [
        "instructions: 1031, the record has 1000"
    ]
    assert len(gate.compare(GOOD, GOOD | {"registers": 104, "shared": 104_000})) == 2
    (wide,) = gate.compare(GOOD, GOOD | {"wide_multiplications_in_loops": 3})
    assert wide == "wide_multiplications_in_loops: 3, the record has 2"


def test_wide_multiplications_count_in_innermost_loops_only():
    sass = """
        /*0000*/                   IMAD.WIDE R2, R3, R4, R6 ;
        /*0010*/                   IMAD.WIDE R2, R3, R4, R6 ;
        /*0020*/                   IMAD.WIDE R2, R3, R4, R6 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   BRA 0x10 ;
        /*0050*/                   BRA 0x50 ;
"""
    assert gate.wide_multiplications(sass) == 1
