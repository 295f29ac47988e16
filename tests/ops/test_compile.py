"""The compile gate: every kernel compiles without a GPU, within the limits of each architecture, and the gate can fail."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compile_kernels as gate


@pytest.mark.slow
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
    """wgmma and bulk copies in the main GEMM of sm_90; asynchronous copies on older architectures."""
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
    "instructions_per_element": 10.0,
    "bytes_moved": 1_000_000,
    "tensor_core": 8,
    "dependencies": 0,
    "accesses_before_wait": 0,
    "wide_multiplications_in_loops": 2,
    "serialised": 0,
}
HALF = gate.Problem("split", 64, 64, 64, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "3 spill instructions"),
        ({"shared": 300_000}, "300000 bytes of shared memory, the device has 232448"),
        ({"tensor_memory": 1024}, "1024 columns of tensor memory"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
        ({"serialised": 2}, "2 warnings of serialised matrix instructions"),
        ({"dependencies": 1}, "1 instructions for a dependent launch"),
        ({"kernel": "pointer OVERLAP"}, "0 instructions for a dependent launch"),
        (
            {"kernel": "a OVERLAP", "dependencies": 1, "accesses_before_wait": 2},
            "2 accesses before the wait",
        ),
    ],
)
def test_a_kernel_that_a_device_cannot_run_fails(change, message):
    assert gate.failures(90, HALF, GOOD) == []
    assert gate.failures(90, HALF, GOOD | change) == [message]


def test_exact_float32_and_plain_sums_need_no_tensor_core():
    exact = gate.Problem("split", 64, 64, 64, 4, dtype="float32", precision="ieee")
    assert gate.failures(90, exact, GOOD | {"tensor_core": 0}) == []
    for kernel in ("sum", "mask EVEN_K", "group_sum"):
        assert gate.failures(90, HALF, GOOD | {"tensor_core": 0, "kernel": kernel}) == []


@pytest.mark.parametrize("field", gate.GATED)
def test_a_regression_of_more_than_three_percent_fails(field):
    before = GOOD | {"tensor_memory": 256}
    assert gate.compare(before, before | {field: before[field] * 1.02}) == []
    worse = before[field] * 1.04
    assert gate.compare(before, before | {field: worse}) == [
        f"{field}: {worse}, the record has {before[field]}"
    ]


def test_one_more_wide_multiplication_in_a_loop_fails():
    (wide,) = gate.compare(GOOD, GOOD | {"wide_multiplications_in_loops": 3})
    assert wide == "wide_multiplications_in_loops: 3, the record has 2"


def test_a_launch_moves_each_of_its_tensors_once():
    x, y = torch.empty(4, 8), torch.empty(3, dtype=torch.float64)
    assert gate.bytes_of({"x_ptr": x, "unused_ptr": x, "y_ptr": y, "M": 4}) == 128 + 24
    assert gate.tile_elements({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}) == 64 * 128
    assert gate.tile_elements({"BLOCK_M": 64, "BLOCK_K": 32}) == 64 * 32
    assert gate.tile_elements({"BLOCK": 128, "num_warps": 4}) == 128
    assert gate.tile_elements({"BLOCK_M": 64, "BLOCK_G": 32}) == 64 * 32 * 8
    assert gate.tile_elements({"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_G": 32}) == 64 * 256


def test_the_report_lists_failures_and_improvements(tmp_path, monkeypatch, capsys):
    import triton

    row = {field: value for field, value in GOOD.items() if field != "kernel"}
    stored = {"triton": triton.__version__, "kernels": {HALF.name: {"pointer": row}}}
    (tmp_path / "compile-sm90.json").write_text(json.dumps(stored))
    monkeypatch.setattr(gate, "RESULTS", tmp_path)

    def regressions(change):
        return gate.report(90, [HALF], {HALF.name: {"pointer": row | change}}, recorded=True)

    assert regressions({}) == 0 and "record" not in capsys.readouterr().out
    assert regressions({"instructions": 1040}) == 1
    assert "FAILED: instructions: 1040, the record has 1000" in capsys.readouterr().out
    assert regressions({"instructions": 900}) == 0
    assert "better than the record, replace it with --write" in capsys.readouterr().out


def test_some_problems_are_replaced_in_the_record(tmp_path, monkeypatch):
    import triton

    first, second = gate.PROBLEMS[0], gate.PROBLEMS[1]
    stored = {"triton": triton.__version__, "kernels": {first.name: 1, second.name: 2, "gone": 3}}
    (tmp_path / "compile-sm90.json").write_text(json.dumps(stored))
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    third = gate.PROBLEMS[2].name
    found = gate.merged(90, {third: 5, first.name: 4})
    assert [*found.items()] == [(first.name, 4), (second.name, 2), (third, 5)]
    (tmp_path / "compile-sm90.json").write_text(json.dumps(stored | {"triton": "0.1"}))
    with pytest.raises(SystemExit, match="written under Triton 0.1; replace all of it"):
        gate.merged(90, {})


def test_serialised_matrix_instructions_are_noticed():
    """ptxas's words for a loop that waits after each instruction, and its report on a good kernel."""
    bad = (
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources"
    )
    good = "ptxas info    : Used 207 registers, used 1 barriers, 480 bytes cmem[0]"
    assert len(gate._SERIALISED.findall(bad)) == 1 and not gate._SERIALISED.findall(good)


def test_accesses_before_the_wait_are_counted():
    wait = ["UTMALDG.2D [UR4], [UR24]", "ACQBULK", "LDG.E R8, desc[UR32][R4.64]", "STG.E [R2], R1"]
    assert gate.before_wait(wait) == 0
    assert gate.before_wait(["@P1 LDG.E.128 R4, desc[UR32][R2.64]", *wait]) == 1
    assert gate.before_wait(["UTMASTG.2D [UR4]", "LDGSTS.E [R7]", *wait]) == 2
    assert gate.before_wait(wait[2:]) == 0  # nothing to wait for


@pytest.mark.parametrize("arch", [90, 100])
def test_overlapping_kernels_are_in_the_record(arch):
    """Both kernels of each pair: the one that lets the next begin, and the one that waits."""
    kernels = json.loads(gate.file(arch).read_text())["kernels"]
    found = {
        name.split()[0]
        for problem in gate.problems_of(arch)
        if problem.overlap
        for name in kernels[problem.name]
        if "OVERLAP" in name.split()
    }
    assert {"down", "x", "descriptor", "stream", "combine"} <= found


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
