#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# torchrun that handles SIGTERM (preemption) like a run of a single process: the run saves, and the exit status is 0.
# torchrun itself forwards the signal, kills processes that have not saved within 30 seconds, and reports a failure. Here
# the signal goes to the training processes directly, and torchrun ends with them. If it gets the signal as well, it waits
# for $GRACE seconds.
#   scripts/launch/torchrun.sh --standalone --nproc-per-node 4 -m internimage finetune configs/own_data.yaml data=photos output=runs/photos
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-300}"
torchrun "$@" &
launcher=$!
# shellcheck disable=SC2317,SC2086  # called by the trap; $workers is a list of ids, empty while torchrun starts
stop() {
    local workers
    workers=$(cat "/proc/$launcher/task/"*/children 2>/dev/null) || true
    kill -TERM ${workers:-$launcher} 2>/dev/null || true
}
trap stop TERM
trap 'kill -INT "$launcher" 2>/dev/null || true' INT
status=0
while kill -0 "$launcher" 2>/dev/null; do # `wait` also returns when a signal arrives
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
