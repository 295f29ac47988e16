"""Launches as they reach the CUDA driver, through Triton's own launcher: a driver without a device notes them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.support.paths import ROOT

COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.slow
@pytest.mark.skipif(
    triton.__version__.startswith("3.4."), reason="its kernels have one scratch argument"
)
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, as Triton's launcher does")
def test_repeated_calls_launch_what_triton_launches(tmp_path):
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
        + ["-o", str(tmp_path / "libcuda.so.1"), str(ROOT / "tests/support/libcuda.c")],
        check=True,
    )
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")  # for the linker of Triton 3.5
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    path = f"{ROOT}:{Path(triton.__file__).parent.parent}"  # the Triton of this process
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.launches"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["triton"] == triton.__version__
    assert result["differences"] == [] and result["compared"] > 100
