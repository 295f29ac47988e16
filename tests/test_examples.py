"""Each program of docs/examples runs, its loss falls, and it leaves the files that it says."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

EXAMPLES = ROOT / "docs" / "examples"

# example -> packages it needs, what it prints besides the loss, files it leaves
LEAVES = {
    "llama_sft": (
        ["transformers"],
        ["What colour is grass? green."],
        ["llama_adapter/adapter_config.json", "llama_adapter/adapter_model.safetensors"],
    ),
    "vit_classification": (["transformers"], ["-> 1.00"], ["vit.safetensors"]),
    "diffusion_lora": (
        ["diffusers", "peft"],
        [],
        ["unet.safetensors", "pytorch_lora_weights.safetensors"],
    ),
    "medical_surface": (
        ["nibabel", "skimage", "trimesh", "tensorboard"],
        ["medical_meshes/ct_blob.ply: "],
        ["medical_run/adapter.safetensors", "medical_meshes/ct_blob.ply"],
    ),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LEAVES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVES)
def test_example(name, tmp_path) -> None:
    packages, printed, files = LEAVES[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FastLoRAWarning" not in done.stderr
    (losses,) = re.findall(r"^loss ([\d.]+) -> ([\d.]+)", done.stdout, flags=re.M)
    assert float(losses[1]) < float(losses[0])
    assert all(text in done.stdout for text in printed), done.stdout
    assert all((tmp_path / file).stat().st_size for file in files)
