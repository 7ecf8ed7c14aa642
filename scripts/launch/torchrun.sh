#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# torchrun whose runs end at SIGTERM (preemption) as in a single process: the run saves and the exit status is 0.
# torchrun by itself sends the signal on, kills what has not saved within 30 seconds, and reports a failure. Here the
# training processes get the signal directly, and torchrun ends with them; where it gets the signal, too, it waits $GRACE
# seconds.
#   scripts/launch/torchrun.sh --standalone --nproc-per-node 4 -m internimage finetune configs/own_data.yaml data=photos output=runs/photos
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-300}"
torchrun "$@" &
launcher=$!
# shellcheck disable=SC2317,SC2086  # called by the trap; the workers are several ids, and none while torchrun starts
stop() {
    local workers
    workers=$(cat "/proc/$launcher/task/"*/children 2>/dev/null) || true
    kill -TERM ${workers:-$launcher} 2>/dev/null || true
}
trap stop TERM
trap 'kill -INT "$launcher" 2>/dev/null || true' INT
status=0
while kill -0 "$launcher" 2>/dev/null; do # a wait that a signal has ended says nothing about torchrun
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
