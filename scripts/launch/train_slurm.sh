#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train under Slurm. Two minutes before the time limit Slurm sends SIGTERM: the run saves, and the job is requeued.
#   sbatch --nodes 4 scripts/launch/train_slurm.sh configs/imagenet_huge_640.yaml data=/data/imagenet output=/shared/huge
#SBATCH --job-name internimage
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --signal B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # torchrun gets the signal as well, and would kill after 30 seconds
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# forward the signal to the steps: only the batch script gets it
stop() {
    scancel --signal TERM "$SLURM_JOB_ID" || true
    wait || true
    result=""
    for word in "$@"; do [[ $word == output=* ]] && result=${word#output=}; done
    [[ -f $result/model.safetensors ]] || scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap 'stop "${arguments[@]}"' TERM
arguments=("$@")
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" -m internimage finetune "$@" &
wait $!
