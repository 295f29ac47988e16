"""Compile every kernel ahead of time, without a GPU, and check the registers, memory and instructions of the result.

    python benchmarks/compile_kernels.py --arch 90            # compile, check the limits, compare with the record
    python benchmarks/compile_kernels.py --arch 90 --write    # compile, check, replace benchmarks/results/compile-sm90.json

The launchers run on tensors without storage, under a driver that names the architecture and stops each launch after its
compilation. So exactly the kernels that would run on the device are compiled, specialisations included.

It fails on a register spill, on shared or tensor memory above the device's, on a matrix kernel without tensor-core
instructions, on a warning of ptxas that matrix instructions are serialised, and on regressions from the record: 3 % more instructions, instructions per element, registers, shared or tensor
memory or bytes moved, or one more 64-bit multiplication inside a loop. Improvements of that size are reported; then the
record should be replaced.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results"
ARCHES = (80, 89, 90, 100)
TOLERANCE = 1.03
GATED = (
    "registers",
    "shared",
    "tensor_memory",
    "instructions",
    "instructions_per_element",
    "bytes_moved",
)
# griddepcontrol.launch_dependents and griddepcontrol.wait, which let consecutive kernels overlap.
_DEPENDENCY = re.compile(r"\b(PREEXIT|ACQBULK)\b")
# "wgmma.mma_async instructions are serialized": the kernel waits for each matrix instruction before it issues the next.
_SERIALISED = re.compile(r"\bC75\d\d\b")
# Reads and writes of global memory, except the bulk loads of x and W.
_GLOBAL = re.compile(r"\b(LDG|LDGSTS|STG|UTMASTG|RED|ATOMG)\b")
# Tensor-core instructions of the GPU generations.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")


@dataclass(frozen=True)
class Problem:
    """A layer whose kernels are compiled. groups: of rows with factors of their own, for the plan "grouped" only. activation: of the gated MLP whose
    last layer it is, for the plan "gated" only; rank 0 is no adapter.

    everywhere: compile for every architecture, not only sm_90. overlap: use programmatic dependent launches, which sm_90 and newer have.
    """

    plan: str
    m: int
    k: int
    n: int
    rank: int
    dtype: str = "bfloat16"
    p: float = 0.0
    adapters: str = "float32"
    precision: str = "ieee"
    everywhere: bool = False
    overlap: bool = False
    groups: int = 0
    activation: str = ""

    @property
    def name(self) -> str:
        notes = [self.dtype if self.dtype != "float32" else f"float32/{self.precision}"]
        notes += [f"p{self.p:g}"] if self.p else []
        notes += [f"adapters {self.adapters}"] if self.adapters != "float32" else []
        notes += ["overlap"] if self.overlap else []
        notes += [f"{self.groups} groups"] if self.groups else []
        notes += [self.activation] if self.activation else []
        return f"{self.plan} {self.m}x{self.k}->{self.n} r{self.rank} {' '.join(notes)}"


PROBLEMS = (
    Problem("split", 8192, 4096, 4096, 16, p=0.1, everywhere=True),
    Problem("split", 8192, 4096, 4096, 4, adapters="bfloat16"),
    Problem("split", 8192, 4096, 4096, 64, p=0.1, everywhere=True),
    Problem("split", 8192, 4096, 4096, 256, p=0.1, everywhere=True),
    Problem("fused", 32768, 1024, 1024, 16, everywhere=True),
    Problem("fused", 8192, 4096, 4096, 64, dtype="float16", everywhere=True),
    Problem("fused", 4096, 768, 768, 4),
    Problem("in_place", 8192, 4096, 14336, 16, dtype="float16", p=0.1, everywhere=True),
    Problem("decode", 1, 4096, 4096, 16),
    Problem("decode", 32, 4096, 4096, 16, p=0.1, everywhere=True),
    Problem("decode", 64, 4096, 4096, 64, p=0.1, everywhere=True),
    Problem("split", 4095, 1023, 1025, 12, p=0.1, everywhere=True),
    Problem("split", 4096, 1000, 1000, 16, p=0.1),
    Problem("decode", 7, 8, 24, 1),
    Problem("decode", 33, 24, 40, 8, dtype="float32", p=0.1, everywhere=True),
    Problem("accumulate", 8192, 4096, 4096, 16, p=0.1, everywhere=True),
    Problem("accumulate", 32768, 1024, 1024, 16),
    Problem("accumulate", 520, 1040, 528, 200, p=0.1, everywhere=True),
    Problem("accumulate", 520, 1040, 528, 200, dtype="float32", everywhere=True),
    Problem("accumulate", 777, 1023, 1025, 64, p=0.1, everywhere=True),
    Problem("accumulate", 4096, 768, 2304, 8, dtype="float32", precision="tf32"),
    Problem("split", 4096, 768, 2304, 8, dtype="float32", p=0.1, precision="tf32", everywhere=True),
    Problem("in_place", 4096, 768, 2304, 8, dtype="float32", p=0.1, everywhere=True),
    Problem("in_place", 4096, 768, 2304, 256, dtype="float32", p=0.1, everywhere=True),
    Problem("fused", 4096, 768, 768, 32, dtype="float32", precision="tf32"),
    Problem("decode", 64, 4096, 4096, 16, dtype="float32", everywhere=True),
    Problem("split", 4096, 768, 2304, 8, p=0.1, everywhere=True, overlap=True),
    Problem("decode", 32, 4096, 4096, 16, everywhere=True, overlap=True),
    Problem("grouped", 4096, 4096, 4096, 16, p=0.1, everywhere=True, groups=8),
    Problem("grouped", 4096, 4096, 4096, 64, p=0.1, everywhere=True, groups=8),
    Problem("grouped", 4096, 4096, 4096, 128, p=0.1, everywhere=True, groups=8),
    Problem("grouped", 64, 4096, 4096, 16, groups=64),
    Problem("grouped", 777, 1023, 1025, 40, "float16", p=0.1, adapters="float16", everywhere=True, groups=8),
    Problem("grouped", 777, 1023, 1025, 12, p=0.1, groups=8),
    Problem("grouped", 4096, 768, 2304, 8, "float32", p=0.1, everywhere=True, groups=8),
    Problem("grouped", 4096, 768, 2304, 64, "float32", p=0.1, everywhere=True, groups=8),
    Problem("grouped", 4096, 768, 2304, 64, "float32", p=0.1, precision="tf32", groups=8),
    Problem("grouped", 4096, 2048, 1536, 8, p=0.1, everywhere=True, groups=128),
    Problem("grouped", 4096, 2048, 1536, 16, everywhere=True, groups=128),
    Problem("grouped", 4096, 2048, 1536, 64, p=0.1, everywhere=True, groups=128),
    Problem("gated", 4096, 8192, 2048, 16, p=0.1, everywhere=True, activation="silu"),
    Problem("gated", 4096, 8192, 2048, 16, everywhere=True, activation="gelu"),
    Problem("gated", 4096, 8192, 2048, 64, p=0.1, everywhere=True, activation="gelu_tanh"),
    Problem("gated", 4096, 8192, 2048, 256, "float16", p=0.1, everywhere=True, activation="gelu"),
    Problem("gated", 4096, 8192, 2048, 0, everywhere=True, activation="silu"),
    Problem("gated", 777, 1025, 1023, 12, p=0.1, everywhere=True, activation="gelu_tanh"),
    Problem("gated", 4096, 2304, 768, 8, "float32", p=0.1, everywhere=True, activation="gelu"),
    Problem("gated", 4096, 2304, 768, 64, "float32", p=0.1, precision="tf32", activation="silu"),
)  # fmt: skip


def problems_of(arch: int) -> list[Problem]:
    from fastlora.kernels.config import ARCHITECTURES

    rows = ARCHITECTURES[arch].decode_rows
    return [
        p
        for p in PROBLEMS
        if (p.everywhere or arch == 90)
        and (p.plan != "decode" or p.m <= rows)
        and (arch >= 90 or not p.overlap)
    ]


def compile_problem(arch: int, problem: Problem) -> list[dict[str, Any]]:
    """An entry for each kernel that one forward and backward pass of the problem launches on sm_<arch>."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastlora.kernels import recording
    from fastlora.kernels.config import ARCHITECTURES
    from fastlora.ops import dispatch

    class Named:
        """A driver that only names the target GPU."""

        get_current_device = staticmethod(lambda: arch)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    driver.set_active(Named())
    # Their keys do not hold the architecture.
    dispatch._plan.cache_clear()
    recording._recordings.clear()
    recording._seen.clear()
    choose, launch = dispatch.launch_choice, JITFunction.run
    entries: dict[str, dict[str, Any]] = {}

    def choice_of(*arguments: Any) -> dispatch.Choice:
        choice = choose(*arguments)
        if not problem.overlap:
            return choice
        assert choice.config is not None
        return replace(choice, config=choice.config.overlapped())

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled = launch(self, *arguments, grid=grid, warmup=True, **named)
        entry = read(compiled)
        tiles = {k: v for k, v in named.items() if k.startswith(("BLOCK", "SUB", "num_"))}
        threads = 32 * tiles["num_warps"]
        per_element = entry["instructions"] * threads / tile_elements(tiles)
        entry["instructions_per_element"] = round(per_element, 3)
        entry["bytes_moved"] = bytes_of(named)
        entry["tiles"] = tiles
        flags = sorted(key for key, value in named.items() if value is True)
        entries[" ".join([self.fn.__name__.strip("_").removesuffix("_kernel"), *flags])] = entry

    with (
        mock.patch.object(dispatch, "device_architecture", lambda device: ARCHITECTURES[arch]),
        mock.patch.object(dispatch, "float32_precision", lambda: problem.precision),
        mock.patch.object(dispatch, "launch_choice", choice_of),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        launches = {"grouped": launch_grouped, "gated": launch_gated}
        launches.get(problem.plan, launch_layer)(problem)
    return [{"kernel": name, **entry} for name, entry in entries.items()]


def launch_layer(problem: Problem) -> None:
    """One forward and backward pass of a layer, on tensors without storage."""
    from fastlora.ops.reference import LowRank
    from fastlora.ops.triton import linear as triton_linear

    x, dy, lora_a, lora_b, seed = tensors_of(problem)
    n, k = problem.n, problem.k
    weight, bias = x.new_empty(n, k), x.new_empty(n)
    low = LowRank(lora_a, lora_b, 2.0, problem.p, seed)
    _, s = triton_linear._forward(x, weight, bias, *low, problem.plan)
    triton_linear._backward(dy, x, weight, s, *low, True, True, True, problem.plan)


def launch_grouped(problem: Problem) -> None:
    """The low-rank products of one forward and backward pass of a batch in groups, on tensors without storage."""
    import torch

    from fastlora.ops.triton import grouped as ops

    x, dy, a, b, seed = tensors_of(problem)
    groups = problem.groups
    scale = torch.empty(groups, device="meta")
    offsets = torch.empty(groups + 1, dtype=torch.int32, device="meta")
    mask = {} if seed is None else {"seed": seed, "thresholds": offsets[1:].long()}
    s = ops.grouped_s(x, a, offsets, **mask)
    ops.grouped_add_(torch.empty_like(dy), s, b, scale, offsets)
    ds, _ = ops.grouped_ds_db(dy, s, b, scale, offsets)
    assert ds is not None
    ops.grouped_da_dx_(torch.empty_like(x), x, ds, a, scale, offsets, **mask)


def launch_gated(problem: Problem) -> None:
    """The middle of a gated MLP, forward with S of its last layer and backward through it, on tensors without storage."""
    from fastlora.kernels.config import gated_down_config
    from fastlora.kernels.gated import gated_down
    from fastlora.ops import dispatch
    from fastlora.ops.reference import Layer, LowRank
    from fastlora.ops.triton import gated as triton_gated
    from fastlora.ops.triton.linear import mask_of

    g, dy, lora_a, lora_b, seed = tensors_of(problem)
    u, s = g.clone(), g.new_empty(problem.m, problem.rank)
    low = LowRank(lora_a, lora_b, 2.0, problem.p, seed)
    down = Layer(g.new_empty(problem.n, problem.k), None, low)
    triton_gated.product(g, u, problem.activation)
    adapted = problem.rank > 0
    if adapted:
        config = dispatch.launch_choice(g, down.weight, low.rank(), seed is not None).config
        assert config is not None  # the table has this architecture
        precision = dispatch.product_precision(g)
        tiles, mask = gated_down_config(config.down), mask_of(g, low)
        gated_down(g, u, problem.activation, lora_a, tiles, mask=mask, precision=precision)
    for needs_h in (True, False):
        needs = needs_h, adapted and needs_h, adapted
        triton_gated.down_backward(dy, g, u, down, s, problem.activation, needs)


def tensors_of(problem: Problem) -> tuple[Any, ...]:
    """x, dy, the factors A and B, stacked if there are groups, and the seed."""
    import torch

    dtype, adapters = getattr(torch, problem.dtype), getattr(torch, problem.adapters)
    lead = (problem.groups,) if problem.groups else ()
    seed = torch.empty((), dtype=torch.int64, device="meta") if problem.p else None
    return (
        torch.empty(problem.m, problem.k, dtype=dtype, device="meta"),
        torch.empty(problem.m, problem.n, dtype=dtype, device="meta"),
        torch.empty(*lead, problem.rank, problem.k, dtype=adapters, device="meta"),
        torch.empty(*lead, problem.n, problem.rank, dtype=adapters, device="meta"),
        seed,
    )


def tile_elements(tiles: dict[str, int]) -> int:
    """Elements in one program's tile of the largest operand: the output, or x or dy in a pass over them."""
    if "BLOCK" in tiles:
        return tiles["BLOCK"]
    columns = {"BLOCK_N": 1, "BLOCK_K": 1, "BLOCK_G": 8}  # a group of the mask has eight columns
    return tiles["BLOCK_M"] * next(n * tiles[name] for name, n in columns.items() if name in tiles)


def bytes_of(arguments: dict[str, Any]) -> int:
    """The minimum number of bytes that a launch moves: each of its tensors once, partial sums included."""
    held = (getattr(argument, "base", argument) for argument in arguments.values())
    tensors = {id(t): t for t in held if hasattr(t, "untyped_storage")}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def read(compiled: Any) -> dict[str, Any]:
    """Registers, spills, memory and instruction counts of a compiled kernel."""
    sass = disassemble(compiled.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", sass)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    return {
        "registers": numbers["REG"],
        "spills": sum(bool(re.search(r"\b(STL|LDL)\b", i)) for i in instructions),
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "instructions": len(instructions),
        "tensor_core": sum(bool(_TENSOR_CORE.search(i)) for i in instructions),
        "bulk_copies": sum("UTMALDG" in i or "UTMASTG" in i for i in instructions),
        "async_copies": sum("LDGSTS" in i for i in instructions),
        "dependencies": sum(bool(_DEPENDENCY.search(i)) for i in instructions),
        "accesses_before_wait": before_wait(instructions),
        "wide_multiplications_in_loops": wide_multiplications(sass),
        "serialised": len(_SERIALISED.findall(assembler_warnings(compiled.asm["ptx"]))),
    }


@functools.cache
def assembler_warnings(ptx: str) -> str:
    """What ptxas says as it assembles code for Hopper again, the only GPU with these instructions; Triton shows it only if ptxas fails."""
    from triton import knobs

    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target != "sm_90a":
        return ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={target}",
            file.name,
            "-o",
            os.devnull,
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


@functools.cache
def disassemble(cubin: bytes) -> str:
    """The resource usage and the instructions of a kernel.

    Cached, because problems share kernels and disassembling takes as long as compiling.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def before_wait(instructions: list[str]) -> int:
    """Number of global memory accesses before the wait for the preceding kernel; 0 without a wait."""
    waits = [i for i, text in enumerate(instructions) if re.search(r"\bACQBULK\b", text)]
    return sum(bool(_GLOBAL.search(text)) for text in instructions[: min(waits, default=0)])


def wide_multiplications(sass: str) -> int:
    """Number of 64-bit address multiplications between a backward branch and its target (an innermost loop)."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    addresses = [int(address, 16) for address, _ in lines]
    loops = []
    for address, (_, text) in zip(addresses, lines, strict=True):
        target = re.search(r"\bBRA(?:\.\w+)*\s+(?:`\(\.\w+\)|.*?)(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            loops.append((int(target.group(1), 16), address))
    innermost = [
        (a, b)
        for a, b in loops
        if not any(c >= a and d <= b and (c, d) != (a, b) for c, d in loops)
    ]
    return sum(
        "IMAD.WIDE" in text and any(a <= address <= b for a, b in innermost)
        for address, (_, text) in zip(addresses, lines, strict=True)
    )


def failures(arch: int, problem: Problem, entry: dict[str, Any]) -> list[str]:
    """Violations of the device's limits by a compiled kernel; `entry` also has the key `kernel`."""
    from fastlora.kernels.config import ARCHITECTURES

    row = ARCHITECTURES[arch]
    exact = problem.dtype == "float32" and problem.precision == "ieee"
    found = []
    if entry["spills"]:
        found.append(f"{entry['spills']} spill instructions")
    if entry["shared"] > row.shared:
        found.append(f"{entry['shared']} bytes of shared memory, the device has {row.shared}")
    if entry["tensor_memory"] > row.tensor_memory:
        found.append(f"{entry['tensor_memory']} columns of tensor memory")
    if entry["serialised"]:
        found.append(f"{entry['serialised']} warnings of serialised matrix instructions")
    name, *flags = entry["kernel"].split()
    without = ("sum", "mask", "group_sum", "gated_product")
    plain = name in without or (name == "gated_gradients" and problem.rank == 0)
    if not plain and not exact and not entry["tensor_core"]:
        found.append("no tensor-core instruction")
    if ("OVERLAP" in flags) != bool(entry["dependencies"]):
        found.append(f"{entry['dependencies']} instructions for a dependent launch")
    if entry["accesses_before_wait"]:
        found.append(f"{entry['accesses_before_wait']} accesses before the wait")
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Regressions of the new entry from the old one."""
    limits = {field: TOLERANCE * old[field] for field in GATED}
    limits["wide_multiplications_in_loops"] = old["wide_multiplications_in_loops"]
    return [
        f"{field}: {new[field]}, the record has {old[field]}"
        for field, limit in limits.items()
        if new[field] > limit
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, choices=ARCHES, nargs="+", default=ARCHES)
    parser.add_argument("--write", action="store_true", help="replace the committed records")
    parser.add_argument(
        "--only", default="", help="compile only problems whose name contains TEXT", metavar="TEXT"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: number of cores)"
    )
    arguments = parser.parse_args(argv)
    chosen = {
        arch: [p for p in problems_of(arch) if arguments.only in p.name] for arch in arguments.arch
    }
    bad = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        compiled = {
            arch: {p: pool.submit(compile_problem, arch, p) for p in problems}
            for arch, problems in chosen.items()
        }
    for arch, problems in chosen.items():
        kernels = {
            p.name: {e.pop("kernel"): e for e in compiled[arch][p].result()} for p in problems
        }
        bad += report(arch, problems, kernels, recorded=not arguments.write)
        if arguments.write:
            if arguments.only:
                kernels = merged(arch, kernels)
            file(arch).write_text(json.dumps(envelope(arch, kernels), indent=1) + "\n")
    return 1 if bad else 0


def report(
    arch: int, problems: list[Problem], kernels: dict[str, dict[str, Any]], recorded: bool
) -> int:
    """Print a table and the failures; return their number. recorded: whether to compare with the record."""
    import triton

    old: dict[str, Any] = {}
    if recorded and file(arch).is_file():
        stored = json.loads(file(arch).read_text())
        if stored["triton"] == triton.__version__:  # counts of another compiler are not comparable
            old = stored["kernels"]
    bad = 0
    print(f"sm_{arch}: registers, spills, shared memory, instructions, tensor-core instructions")
    for problem in problems:
        print(f"  {problem.name}")
        for kernel, entry in kernels[problem.name].items():
            row = (
                entry[f] for f in ("registers", "spills", "shared", "instructions", "tensor_core")
            )
            print(f"    {kernel:50s}" + "".join(f"{value:9d}" for value in row), flush=True)
            wrong = failures(arch, problem, {"kernel": kernel, **entry})
            before = old.get(problem.name, {}).get(kernel)
            wrong += compare(before, entry) if before else []
            for line in wrong:
                print(f"      FAILED: {line}")
            for line in compare(entry, before) if before and not wrong else []:
                print(f"      better than the record, replace it with --write: {line}")
            bad += len(wrong)
    return bad


def envelope(arch: int, kernels: dict[str, Any]) -> dict[str, Any]:
    """The content of an architecture's record."""
    import triton

    return {"architecture": f"sm_{arch}", "triton": triton.__version__, "kernels": kernels}


def merged(arch: int, kernels: dict[str, Any]) -> dict[str, Any]:
    """The record of every problem, with these replaced. Raises: SystemExit if another compiler wrote the record."""
    import triton

    stored = json.loads(file(arch).read_text())
    if stored["triton"] != triton.__version__:
        raise SystemExit(
            f"{file(arch)}: written under Triton {stored['triton']}; replace all of it, without --only"
        )
    all_kernels = stored["kernels"] | kernels
    names = [p.name for p in problems_of(arch)]
    return {name: all_kernels[name] for name in names if name in all_kernels}


def file(arch: int) -> Path:
    return RESULTS / f"compile-sm{arch}.json"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    raise SystemExit(main())
