# SPDX-License-Identifier: MIT
"""Processes of a torchrun launch exit when torchrun is killed."""

import os
import threading

_INTERVAL = 1.0  # seconds
_stop: threading.Event | None = None  # ends the watching thread, if there is one


def end_with_torchrun() -> None:
    """From now on, exit when torchrun is killed and cannot end its processes itself.

    Otherwise they would keep training, and write to the folder of the next run. A run can be killed at any time without
    harm, so this process exits at once. If torchrun is asked to stop, it waits for its processes, and nothing happens
    here. Neither does anything if torchrun has not started this process, which then may outlive its parent (nohup).

    A thread polls the parent's id, which changes when the parent is gone; not on Windows. Linux could send a signal
    instead (PR_SET_PDEATHSIG), but it does so when the thread that started this process ends, while torchrun may still
    be running, and not at all if torchrun was gone before the request.
    """
    global _stop
    if "TORCHELASTIC_RUN_ID" not in os.environ or _stop is not None:
        return
    parent, stop = os.getppid(), threading.Event()

    def watch() -> None:
        while not stop.wait(_INTERVAL):
            if os.getppid() != parent:
                _exit()

    threading.Thread(target=watch, name="torchrun", daemon=True).start()
    _stop = stop


def outlive_torchrun() -> None:
    """Undo `end_with_torchrun`, when the work is done."""
    global _stop
    if _stop is not None:
        _stop.set()
        _stop = None


def _exit() -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            os.write(2, b"torchrun was killed, so its processes exit; run the same command again to resume\n")
        except OSError:  # stderr is closed
            pass
    os._exit(1)  # not by an exception: other threads may wait for processes that are gone
