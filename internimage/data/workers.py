# SPDX-License-Identifier: MIT
"""Signals in a loader's workers: the process that loads decides when they end, and nothing else does."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = hasattr(signal, "sigwaitinfo")  # not on Windows and macOS, where workers end at any SIGTERM


@contextmanager
def signals_for_us() -> Iterator[None]:
    """Context in which a loader's workers are started that no signal ends, unless this process sends it.

    torchrun, systemd and `timeout` send SIGTERM to a whole group of processes, and a terminal SIGINT: without its
    workers a run could not end the step that it is in and save. To be used together with `worker_signals`.
    """
    if not _SIGNALS:
        yield
        return
    # blocked from before the fork: what a worker does about it would come too late for a quick signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_signals(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: ignore Ctrl-C; end at SIGTERM of the process that loads alone.

    That process ends its workers with it where an exception has left them; it would wait for deaf ones forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_exception
    if not _SIGNALS:
        return
    # SIGTERM also where workers are not forked; SIGINT is ignored and stays blocked, as it came
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process().pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _report_exception(kind, error, traceback) -> None:
    """A worker's own errors travel to the process that loads. What comes here is of the thread that hands over tensors'
    descriptors: it prints a traceback wherever the other side leaves in the middle of that, as it does on Ctrl-C."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)
