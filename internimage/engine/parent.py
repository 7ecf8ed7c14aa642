# SPDX-License-Identifier: MIT
"""Processes of a torchrun launch end when torchrun is gone."""

import os
import threading

_INTERVAL = 1.0  # seconds
_watched: threading.Event | None = None  # to be set where nobody watches any more


def end_with_torchrun() -> None:
    """From now on, end this process when torchrun is killed and so cannot end its processes.

    They would go on to train, and write to the folder of the run that is started next. To be killed is what a run
    survives at any instant, so it ends as if it was. Asked to stop, torchrun waits for its processes, and nothing
    happens here. Nor where torchrun has not started this process: what a shell has started may outlive it (nohup).

    A thread asks for the parent, which the system changes when the old one is gone; not on Windows. Linux could send a
    signal instead (PR_SET_PDEATHSIG), but that comes when the thread ends that has started this process, which need not
    be torchrun's last, and not at all if torchrun was gone before it was asked for.
    """
    global _watched
    if "TORCHELASTIC_RUN_ID" not in os.environ or _watched is not None:
        return
    parent, done = os.getppid(), threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            if os.getppid() != parent:
                _end()

    threading.Thread(target=watch, name="torchrun", daemon=True).start()
    _watched = done


def outlive_torchrun() -> None:
    """Take `end_with_torchrun` back, when the work is done."""
    global _watched
    if _watched is not None:
        _watched.set()
        _watched = None


def _end() -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            os.write(2, b"torchrun is gone, so its processes end; the same command goes on from the last checkpoint\n")
        except OSError:  # nobody is left to read it
            pass
    os._exit(1)  # not by an exception: other threads may wait for processes that are gone
