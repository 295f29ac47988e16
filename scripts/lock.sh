#!/usr/bin/env bash
# Writes .ci/locks/*.txt: the versions of constraints.txt with the hashes of all their files on PyPI. Needs uv
# (pip install uv) and the network. Run it after every change of pyproject.toml or constraints.txt.
# torch, triton and the CUDA libraries are excluded, because the package index determines the build, CPU or CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=(uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes --no-annotate --no-header --constraints constraints.txt)
unhashed='^(torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z-]*)=='
for which in demo test; do
    extras=(--extra medical)
    [ "$which" = test ] && extras+=(--extra dicom --extra itk --extra dev --extra docs)
    echo 'setuptools>=77' | "${lock[@]}" pyproject.toml "${extras[@]}" - --output-file ".ci/locks/$which.txt"
done
# Only the data of these packages is used, so their dependencies are not installed.
printf 'TPTBox\nnilearn\n' | "${lock[@]}" --no-deps - --output-file .ci/locks/data.txt
for file in .ci/locks/*.txt; do
    awk -v unhashed="$unhashed" '/^[^ ]/ { skip = $0 ~ unhashed } !skip' "$file" > "$file.new"
    mv "$file.new" "$file"
done
