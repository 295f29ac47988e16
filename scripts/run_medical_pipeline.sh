#!/usr/bin/env bash
# Preprocess the data, fine-tune with LoRA, fine-tune all weights, and write one report that compares both on held-out data.
#
#   bash scripts/run_medical_pipeline.sh [--out DIR] [--seed N] [flags of train_medical.py]
#
#   --out DIR    folder of the cache, the runs and the report (default: runs/pipeline)
#   --seed N     random seed of both trainings (default: 0)
#
# All other flags are passed to both trainings. The flags that select the data (--data_root, --original_nifti_dir, --demo,
# --modality, --channel, --classes) are also passed to the preprocessing, --device also to the evaluation, and
# --skip_invalid to the preprocessing only. The default data are the bundled cases.
# If the pipeline is interrupted, the same command continues it; --overwrite starts from the beginning.
# The environment variable PYTHON sets the interpreter (default: python3).
set -euo pipefail

usage() { sed -n '2,/^set -e/{/^set -e/d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

python=${PYTHON:-python3}
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=runs/pipeline
seed=0
preprocess=()
train=()
evaluate=()
continue=(--resume auto)

while (($#)); do
  flag=$1
  shift
  case $flag in
    -h | --help) usage; exit 0 ;;
    --out | --seed | --device | --data_root | --original_nifti_dir | --demo | --modality | --channel)
      if ((!$#)); then
        echo "error: $flag: expected a value" >&2
        exit 2
      fi ;;&
    --out) out=$1; shift ;;
    --seed) seed=$1; shift ;;
    --device) train+=("$flag" "$1"); evaluate+=("$flag" "$1"); shift ;;
    --data_root | --original_nifti_dir | --demo | --modality | --channel)
      preprocess+=("$flag" "$1"); train+=("$flag" "$1"); shift ;;
    --classes)
      names=("$flag")
      while (($#)) && [[ $1 != --* ]]; do names+=("$1"); shift; done
      preprocess+=("${names[@]}"); train+=("${names[@]}") ;;
    --skip_invalid) preprocess+=("$flag") ;;
    --overwrite) train+=("$flag"); continue=() ;;
    *) train+=("$flag") ;;
  esac
done

step() { printf '\n== %s\n' "$1"; }

step "1/4 preprocess"
"$python" "$scripts/preprocess_medical.py" --seed "$seed" --cache_dir "$out/cache" ${preprocess[@]+"${preprocess[@]}"}
for kind in lora full; do
  step "$([[ $kind == lora ]] && echo 2/4 || echo 3/4) train $kind"
  "$python" "$scripts/train_medical.py" ${train[@]+"${train[@]}"} ${continue[@]+"${continue[@]}"} \
    --seed "$seed" --cache_dir "$out/cache" --finetune "$kind" --checkpoint_dir "$out/$kind"
done
step "4/4 evaluate"
"$python" "$scripts/eval_medical.py" --checkpoint "$out/lora" --full "$out/full" --output_dir "$out/eval" \
  --save_predictions --visualize ${evaluate[@]+"${evaluate[@]}"}
printf '\nreport: %s\n' "$out/eval/report.html"
