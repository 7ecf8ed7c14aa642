#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train on all GPUs of this machine, or in $GPUS processes. SIGTERM saves and ends; the same command resumes.
#   scripts/launch/train_one_machine.sh configs/imagenet_tiny.yaml data=/data/imagenet output=runs/tiny
#   GPUS=2 scripts/launch/train_one_machine.sh configs/own_data.yaml data=photos output=runs/photos device=cpu
set -euo pipefail
exec "$(dirname "$0")/torchrun.sh" --standalone --nproc-per-node "${GPUS:-gpu}" -m internimage finetune "$@"
