#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train on several machines: run this on each, with the same arguments and an `output` folder that they share.
#   NODES=4 HEAD=node0:29500 scripts/launch/train_nodes.sh configs/imagenet_base.yaml data=/data/imagenet output=/shared/base
# SIGTERM on one of them saves and ends the run on all; the same commands resume it.
set -euo pipefail
: "${NODES:?number of machines}" "${HEAD:?HOST:PORT of one of them}"
exec "$(dirname "$0")/torchrun.sh" --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-internimage}" -m internimage finetune "$@"
