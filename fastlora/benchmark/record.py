"""The JSON record of a run: environment, results, and what did not run and why."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.benchmark.cases import BASELINE
from fastlora.files import write_json

NVIDIA_SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks_throttle_reasons.active",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
Record = dict[str, Any]


class Budget:
    """Time budget: a case may start if one as slow as the slowest so far would end in time. None means no limit."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._case_began = clock()
        self._slowest = 0.0

    def begin_case(self, expected: float = 0.0) -> bool:
        """expected: seconds that this case will take at least."""
        self._case_began = self._clock()
        slowest = max(self._slowest, expected)
        return self._end is None or self._case_began + slowest < self._end

    def end_case(self) -> float:
        """Seconds since `begin_case`."""
        took = self._clock() - self._case_began
        self._slowest = max(self._slowest, took)
        return took


def new_record(
    device: torch.device,
    reps: int,
    case_names: list[str],
    git_sha: str | None,
    command: str | None = None,
) -> Record:
    """A record in which no case has run.

    results: a row for each case, mode, timing and implementation (its name is under `backend`). absent: implementations without a row, and the reason. call_overhead:
    CPU time to issue a call. eta: the frozen layer's time over forced Triton's. seconds: duration of each case, compilation
    and checks included. not_run: the cases that have not ended.
    """
    return {
        "environment": environment(device, reps, git_sha, command),
        "results": [],
        "absent": [],
        "call_overhead": [],
        "eta": [],
        "seconds": {},
        "not_run": case_names,
    }


def write(record: Record, path: Path) -> None:
    """Write the record atomically, so that a killed run leaves the complete record of its last case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def gpu_file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def environment(
    device: torch.device, reps: int, git_sha: str | None = None, command: str | None = None
) -> dict[str, Any]:
    """Device, versions and command, for a reader who repeats the run.

    git_sha: the commit, for sources without a git folder; dirty is then null. Both are null for an installed package, which `fastlora`,
    the version, names. command: default that of the process.
    """
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": device.type,
        **(_gpu(device) if device.type == "cuda" else {}),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        **({"capability": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {}),
        "python": platform.python_version(),
        "fastlora": fastlora.__version__,
        **{name: _version(name) for name in ("torch", "triton", "peft")},
        "git_sha": git_sha or _git("rev-parse", "HEAD"),
        "dirty": None if git_sha or status is None else bool(status),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "reps": reps,
        "baseline": BASELINE,
        "command": command or "python " + " ".join(without_folders(a) for a in sys.argv),
    }


def without_folders(text: str) -> str:
    """The text with absolute paths shortened to the names of the files: what a record holds must not say where this machine keeps them."""
    home = os.path.expanduser("~")
    if len(home) > 1:  # not the root, nor unknown
        text = text.replace(home, "~")
    return re.sub(r"(?<![\w/.])~?(?:/[^\s/'\":,]+)*/(?=[^\s/'\":,])", "", text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of git in the folder of the sources; None for an installed package, whatever repository it lies in."""
    root = Path(fastlora.__file__).resolve().parents[1]
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    return _output("git", "-C", str(root), *arguments)


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi prints them, or None where it does not run."""
    query = f"--query-gpu={','.join(NVIDIA_SMI)}"
    printed = _output("nvidia-smi", query, "--format=csv,noheader", f"--id={_gpu_index()}")
    if printed is None:
        return None
    return dict(zip(NVIDIA_SMI, printed.split(", "), strict=False))


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts = nvidia_smi() or {}
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": facts.get("driver_version"),
        "clocks_before": facts or None,
    }


def _gpu_index() -> str:
    """The index of torch's device 0 for nvidia-smi."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")  # of Linux
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """The output of the command, or None if it is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
