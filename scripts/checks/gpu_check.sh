#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Checks that need a GPU, in stages of at most 8 minutes, without network. Appends to a report as it goes.
#
#   scripts/checks/gpu_check.sh build|test|sanitize|atomics|bench-ops|profile|variants|bench-models|all
#
# build         nvcc's module for this GPU, if none is there that serves it
# test          the tests that use the GPU, with nvcc's kernels and with NVRTC's; builds the peers in the background
# sanitize      compute-sanitizer: memcheck, and initcheck if time is left
# atomics       the rate of atomic additions in the backward's footprint
# bench-ops     the operator against the official kernels and DCNv4's
# profile       the counters of each kernel, by Nsight Compute (ncu)
# variants      the kernels' variants side by side
# bench-models  the models against others
# all           all of them, also after one that fails
#
# PYTHON     the interpreter, with torch, timm and pytest     (python3)
# OUT        folder for results                               (build/gpu-check)
# REPORT     the Markdown file to append to                   (docs/benchmarks/gpu.md; with OUT: OUT/gpu.md)
# LIMIT      seconds that a stage may take                    (480)
# OFFICIAL   a checkout of OpenGVLab/InternImage, for the benchmarks
# DCNV4      a checkout of OpenGVLab/DCNv4, likewise
# CPU_TESTS  1: `test` also runs the tests that use no GPU
# RACECHECK  1: `sanitize` also runs racecheck, on the kernels' variants
#
# Status: 0; 1 if a check failed; 2 if there is no GPU or no torch.
set -euo pipefail
for name in OUT REPORT OFFICIAL DCNV4 PYTHON; do # paths are relative to where this was called
    case ${!name:-/} in
    /*) ;;
    */*) export "$name=$PWD/${!name}" ;;
    *) if [ "$name" != PYTHON ]; then export "$name=$PWD/${!name}"; fi ;;
    esac
done
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
case ${1:-} in
build | test | sanitize | atomics | bench-ops | profile | variants | bench-models | all)
    exec "${PYTHON:-python3}" scripts/checks/gpu_check.py "$1"
    ;;
*)
    sed -n '3,27s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
