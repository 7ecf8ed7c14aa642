#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train on several machines: run this on each of them, with the same arguments and a folder for `output` that all see.
#   NODES=4 HEAD=node0:29500 scripts/launch/train_nodes.sh configs/imagenet_base.yaml data=/data/imagenet output=/shared/base
# SIGTERM to one of them saves and ends the run on all; the same commands go on.
set -euo pipefail
: "${NODES:?how many machines}" "${HEAD:?HOST:PORT of one of them}"
exec "$(dirname "$0")/torchrun.sh" --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-internimage}" -m internimage finetune "$@"
