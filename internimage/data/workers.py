# SPDX-License-Identifier: MIT
"""Signals in loader workers: only the process that started them ends them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_HAS_SIGWAITINFO = hasattr(signal, "sigwaitinfo")  # not on Windows and macOS, where any SIGTERM ends a worker


@contextmanager
def block_worker_signals() -> Iterator[None]:
    """Context in which to start loader workers that only a signal of this process can end.

    torchrun, systemd and `timeout` send SIGTERM to a whole process group, and a terminal SIGINT: without its workers, a
    run could not finish the current step and save. To be used together with `init_worker_signals`.
    """
    if not _HAS_SIGWAITINFO:
        yield
        return
    # blocked before the fork: handling them in the worker would be too late for a signal that arrives at once
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker_signals(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: ignore SIGINT, and exit on SIGTERM only if the loading process sent it.

    The loading process terminates its workers that way after an exception; if they ignored it, it would wait for them
    forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_exception
    parent = multiprocessing.parent_process()
    if not _HAS_SIGWAITINFO or parent is None:
        return
    # SIGTERM is blocked here too for workers that are not forked; SIGINT is ignored and stays blocked if it was
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _report_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception, unless it means that the loading process is gone.

    A worker's own errors are sent to the loading process. What arrives here comes from the thread that hands over file
    descriptors of tensors, which would print a traceback whenever the other side exits meanwhile, as on Ctrl-C.
    """
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)
