"""`benchmarks/medical_gpu.sh`."""

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytest.importorskip("nibabel")  # of the application


def test_the_medical_run_on_a_gpu_uses_flags_that_exist():
    """The script runs where nothing can be mended; every flag that it passes to a command is one of that command's."""
    script = (ROOT / "benchmarks/medical_gpu.sh").read_text().replace("\\\n", " ")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    flags = {"common": re.findall(r"--[\w-]+", re.search(r"common=\((.*)\)", script)[1])}
    flags["mixed"] = re.findall(r"--\w+", re.search(r"mixed=\((--.*)\)", script)[1])
    flags["image"] = re.findall(r"--\w+", re.search(r"image=\((.*)\)", script)[1])
    calls = re.findall(r"scripts/(\w+_medical\.py)\" (.*)", script)
    assert {name for name, _ in calls} == {
        f"{verb}_medical.py" for verb in ("preprocess", "train", "eval", "predict")
    }
    helps = {}
    for name, rest in calls:
        used = re.findall(r"(?<![\w-])--[\w-]+", rest)
        used += [flag for group in flags if f"{{{group}[@]}}" in rest for flag in flags[group]]
        if name not in helps:
            command = [sys.executable, f"scripts/{name}", "--help"]
            helps[name] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        missing = [flag for flag in used if not re.search(rf"{flag}\b", helps[name])]
        assert used and missing == [], name
