"""The medical application on generated volumes: fine-tune the packaged decoder with LoRA, and predict a surface from the adapter file alone.

The decoder was pretrained on shapes of this kind, so it improves only a little here. What it gains on anatomy is in docs/medical_experiments.md.
"""

import json
from pathlib import Path

import trimesh

from fastlora.medical.commands import predict, train


def run(program, *arguments):
    """As `fastlora-medical train …` in a shell does."""
    code = program.main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)


# Three CT-like volumes with four shapes each. Yours: "--data_root", "a folder in one of the layouts of docs/quickstart_training.md"
data = ["--demo", "synthetic"]
run(
    train,
    *data,
    *("--checkpoint_dir", "medical_run"),
    *("--epochs", 4),  # about 0.5 s each
    *("--lr", 2e-3),
    *("--device", "cpu"),
)

epochs = json.loads(Path("medical_run/history.json").read_text())["epochs"]
before, after = epochs[0]["val"]["total"], epochs[-1]["val"]["total"]
print(f"loss {before:.4f} -> {after:.4f} on the validation regions")
assert after < before

# The image and a coarse mask of it give a surface in mm; for the model, the file of the adapter is enough.
case = Path("data/synthetic/phantom_000")
run(
    predict,
    *("--checkpoint", "medical_run/adapter.safetensors"),
    *("--image", case / "ct.nii.gz"),
    *("--mask", case / "segmentations" / "blob.nii.gz"),
    *("--output_dir", "medical_meshes"),
    *("--device", "cpu"),
)
(file,) = Path("medical_meshes").rglob("*.ply")
surface = trimesh.load(file)
print(f"{file}: {len(surface.faces)} triangles, {surface.volume / 1000:.1f} ml")
assert surface.is_watertight and surface.volume > 0
