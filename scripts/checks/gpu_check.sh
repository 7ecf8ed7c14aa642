#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Checks that need a GPU, in stages of at most 8 minutes, without network. Appends to a report.
#
#   scripts/checks/gpu_check.sh build|test|sanitize|bench-ops|bench-models|all
#
# PYTHON    the interpreter, with torch, timm and pytest     (python3)
# REPORT    the Markdown file to append to                   (docs/benchmarks/gpu.md)
# OFFICIAL  a checkout of OpenGVLab/InternImage, for the benchmarks
# DCNV4     a checkout of OpenGVLab/DCNv4, likewise
#
# `build` uses an existing internimage/_C_cuda*.so if it loads; otherwise it builds one for this GPU only.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
stage=${1:-}
python=${PYTHON:-python3}
case $stage in
build | test | sanitize | bench-ops | bench-models)
    exec timeout --kill-after=10 480 "$python" scripts/checks/gpu_check.py "$stage" --report "${REPORT:-docs/benchmarks/gpu.md}" \
        ${OFFICIAL:+--official "$OFFICIAL"} ${DCNV4:+--dcnv4 "$DCNV4"}
    ;;
all)
    status=0
    for stage in build test sanitize bench-ops bench-models; do
        "$0" "$stage" || {
            status=$?
            if [ "$status" = 2 ]; then exit 2; fi # no GPU or no torch: the other stages would fail alike
        }
    done
    exit "$status"
    ;;
*)
    sed -n '4,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
