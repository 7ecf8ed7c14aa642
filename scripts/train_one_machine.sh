#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train on all GPUs of this machine, or on as many as GPUS says. SIGTERM saves; the same command goes on.
#   scripts/train_one_machine.sh configs/imagenet_tiny.yaml data=/data/imagenet output=runs/tiny
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m internimage finetune "$@"
