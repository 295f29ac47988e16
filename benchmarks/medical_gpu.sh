#!/usr/bin/env bash
# The medical application on a GPU machine without a package registry: preprocess, train with mixed precision, resume, evaluate on the GPU
# and on the CPU, whose Dice must agree, and predict. Run it in the root of the sources.
#
#   bash benchmarks/medical_gpu.sh --pack DIR   # where there is a registry and `make demo` has run: what that machine lacks (21 MB)
#   WHEELS=DIR bash benchmarks/medical_gpu.sh OUT
#
# Environment: WHEELS (folder of wheels and zips to unpack), PYTHON, DEVICE (cuda), AMP (bf16; off without mixed precision), EPOCHS (10),
# TRAIN_SECONDS (90), WORKERS (4 data loader processes), LIMIT (most seconds of each later stage, 100), THREADS (of each, 2), EXTRA (more flags for the training),
# COMPARE (1: also train with FASTLORA_BACKEND=torch), TESTS (1: also the GPU tests of the application).
set -uo pipefail
root=$PWD
if [ "${1:-}" = --pack ]; then
    set -e
    mkdir -p "${2:?the folder to fill}"
    .venv/bin/python -m pip download --quiet --no-deps --only-binary :all: --dest "$2" \
        --constraint constraints.txt monai narwhals nibabel plotly trimesh
    .venv/bin/python - "$2/volumes.zip" <<'P'
import sys, zipfile
from importlib.util import find_spec
from pathlib import Path
folders = {"TPTBox": "tests/sample_", "nilearn": "datasets/data/mni_icbm152_"}
with zipfile.ZipFile(sys.argv[1], "w") as archive:
    for package, begin in folders.items():
        root = Path(find_spec(package).origin).parent
        archive.writestr(f"{package}/__init__.py", "")
        for file in sorted(root.rglob("*.nii.gz")):
            if file.relative_to(root).as_posix().startswith(begin):
                archive.write(file, Path(package, file.relative_to(root)))
P
    du -sh "$2"
    exit
fi
mkdir -p "$1" && out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda} amp=${AMP:-bf16} epochs=${EPOCHS:-10}
wheels=$(cd "${WHEELS:?the folder that --pack filled}" && pwd)
work=$(mktemp -d)
mkdir "$work/lib"
cd "$work" || exit 1
: > "$out/stages.txt"

stage() {  # name, most seconds, command ...: a log of its own and a line of stages.txt
    local name=$1 limit=$2 begin=$(date +%s.%N) status=0
    shift 2
    timeout -k 15 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    printf '%s: status %d, %.1f s\n' "$name" "$status" "$(echo "$(date +%s.%N) - $begin" | bc -l 2>/dev/null || "$python" -c "import time; print(time.time() - $begin)")" | tee -a "$out/stages.txt"
    [ "$status" = 0 ] || tail -5 "$out/$name.log"
}

stage unpack 60 "$python" -c "
import sys, zipfile, pathlib
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if file.suffix in ('.whl', '.zip'):
        zipfile.ZipFile(file).extractall(sys.argv[2])
        print(file.name)
" "$wheels" "$work/lib"
export PYTHONPATH="$root:$work/lib${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

stage imports 90 "$python" -W ignore -c "
import platform, importlib.metadata as m
for name in ('torch', 'triton', 'numpy', 'scipy', 'scikit-image', 'tensorboard', 'matplotlib', 'tqdm', 'pyyaml', 'pillow', 'safetensors', 'nibabel', 'monai', 'trimesh', 'plotly', 'narwhals'):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, 'MISSING')
import nibabel, trimesh, plotly.offline, skimage.measure, torch.utils.tensorboard, yaml, tqdm, PIL, matplotlib
from monai.metrics.utils import get_mask_edges
import fastlora.medical.commands.main, fastlora.medical.evaluation.report
print(platform.python_version(), nibabel.__file__, trimesh.__file__, fastlora.__file__)
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')
"
cat "$out/imports.log"

mixed=(); [ "$amp" = off ] || mixed=(--amp "$amp")
limit=${LIMIT:-100}
common=(--device "$device" --cache_dir "$work/cache" --no-progress --epochs "$epochs")
stage preprocess 120 "$python" "$root/scripts/preprocess_medical.py" --cache_dir "$work/cache" --num_workers 4
stage train "${TRAIN_SECONDS:-90}" "$python" "$root/scripts/train_medical.py" "${common[@]}" "${mixed[@]}" \
    --num_workers "${WORKERS:-4}" --checkpoint_dir "$work/run" ${EXTRA:-}
if [ ! -f "$work/run/checkpoints/best.pt" ]; then  # without processes that were forked from one with a GPU
    stage train-alone "${TRAIN_SECONDS:-90}" "$python" "$root/scripts/train_medical.py" "${common[@]}" "${mixed[@]}" \
        --overwrite --checkpoint_dir "$work/run" ${EXTRA:-}
fi
grep -h epoch "$out"/train*.log | tail -20
cp -r "$work/run" "$work/resumed"
cp "$work/run/history.json" "$work/run/config.yaml" "$work/run/adapter.safetensors" "$out/"

scan=data/bundled/spine_ct
image=(--image $scan/ct.nii.gz --mask $scan/segmentations/vertebra_22.nii.gz)
export OMP_NUM_THREADS=${THREADS:-2}  # these run at the same time
stage resume "$limit" "$python" "$root/scripts/train_medical.py" --resume "$work/resumed" --epochs "$((epochs + 1))" --device "$device" --no-progress &
stage eval-device "$limit" "$python" "$root/scripts/eval_medical.py" --checkpoint "$work/run" --device "$device" \
    --output_dir "$out/eval-device" --record "$out/record-device.json" &
stage eval-cpu "$limit" "$python" "$root/scripts/eval_medical.py" --checkpoint "$work/run" --device cpu \
    --output_dir "$out/eval-cpu" --record "$out/record-cpu.json" &
stage predict "$limit" "$python" "$root/scripts/predict_medical.py" --checkpoint "$work/run" --device "$device" \
    "${image[@]}" --output_dir "$work/predicted" &
stage predict-cpu "$limit" "$python" "$root/scripts/predict_medical.py" --checkpoint "$work/run/adapter.safetensors" --merged --device cpu \
    "${image[@]}" --output_dir "$work/predicted-cpu" &
wait
grep -h "Dice with" "$out"/predict*.log
cp "$work"/predicted/*.png "$out/" 2>/dev/null

if [ "${COMPARE:-0}" = 1 ]; then
    stage train-torch 60 env FASTLORA_BACKEND=torch "$python" "$root/scripts/train_medical.py" "${common[@]}" "${mixed[@]}" \
        --checkpoint_dir "$work/torch" ${EXTRA:-}
    cp "$work/torch/history.json" "$out/history-torch.json" 2>/dev/null
fi
if [ "${TESTS:-0}" = 1 ]; then
    cd "$root" || exit 1
    stage tests 90 "$python" -m pytest -q -p no:benchmark -p no:cacheprovider tests/medical/training/test_mixed_precision.py \
        tests/medical/training/test_trainer.py -k 'cuda or mixed_precision'
    tail -3 "$out/tests.log"
fi

stage compare 30 "$python" - "$out" <<'P'
import csv, json, sys, pathlib
out = pathlib.Path(sys.argv[1])
history = json.loads((out / "history.json").read_text())
result = {
    "epochs": len(history["epochs"]) - 1,
    "best_epoch": history["best_epoch"],
    "seconds": history["seconds"],
    "val_dice": [round(e["val"]["dice"], 4) for e in history["epochs"]],
    "train_loss": [round(e["train"]["total"], 4) for e in history["epochs"] if "train" in e],
}
tables = [list(csv.DictReader((out / f"eval-{where}" / "eval.csv").open())) for where in ("device", "cpu")]
differences = {}
for one, other in zip(*tables, strict=True):
    assert all(one[k] == other[k] for k in ("subject", "structure", "region", "method"))
    both = float(one["dice"]), float(other["dice"])
    differences.setdefault(one["method"], []).append((abs(both[0] - both[1]), *both))
for method, rows in differences.items():
    worst, mean = max(row[0] for row in rows), [sum(r[i] for r in rows) / len(rows) for i in (1, 2)]
    result[method] = {"device": round(mean[0], 5), "cpu": round(mean[1], 5), "largest_difference": round(worst, 5)}
(out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result))
assert all(r["largest_difference"] < 5e-3 for r in result.values() if isinstance(r, dict)), "device and CPU disagree"
P
cat "$out/compare.log"
cat "$out/stages.txt"
rm -rf "$work"
! grep -qv "status 0" "$out/stages.txt"
