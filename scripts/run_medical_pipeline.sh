#!/usr/bin/env bash
# `fastlora-medical pipeline`: preprocess, fine-tune with LoRA and in full, and compare both in a report.
#
#   bash scripts/run_medical_pipeline.sh [--out DIR] [--seed N] [flags of train_medical.py]
#
# --help lists the flags. The environment variable PYTHON sets the interpreter (default: python3).
exec "${PYTHON:-python3}" -m fastlora.medical.commands pipeline "$@"
