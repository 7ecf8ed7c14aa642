#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs the GPU checks that this folder holds, without network; README.md says what is here.
#
#   bash run.sh [build|test|sanitize|atomics|bench-ops|profile|variants|bench-models|all]
#
# PYTHON  the interpreter that has torch   (python3)
# OUT     folder for results               (results, here)
# The other variables are those of source/scripts/checks/gpu_check.sh.
set -euo pipefail
pack="$(cd "$(dirname "$0")" && pwd)"
python="$("${PYTHON:-python3}" "$pack/source/scripts/checks/gpu/environment.py" "$pack")" || exit 2
export PYTHON="$python" OUT="${OUT:-$pack/results}" PATH="$(dirname "$python"):$PATH"
if [ -z "${OFFICIAL:-}" ] && [ -d "$pack/peers/official" ]; then export OFFICIAL="$pack/peers/official"; fi
if [ -z "${DCNV4:-}" ] && [ -d "$pack/peers/dcnv4" ]; then export DCNV4="$pack/peers/dcnv4"; fi
INTERNIMAGE_COMMIT="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["commit"])' "$pack/manifest.json")"
export INTERNIMAGE_COMMIT
exec bash "$pack/source/scripts/checks/gpu_check.sh" "${1:-all}"
