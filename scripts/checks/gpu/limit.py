# SPDX-License-Identifier: MIT
"""Runs a command for a limited time, after which no process that it started is left.

    python limit.py SECONDS COMMAND [ARGUMENT ...]

Whether the command ends, its time is over or this process is told to end: all of its descendants are killed, also
those in a session of their own and those whose parent has ended. Linux gives orphans to the nearest ancestor that asked
for them, which is this process; so what is to be killed is always below it, and it has to do nothing else.

Status: that of the command; 124 if its time was over; 128 + N if signal N ended the command or this process.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

OUT_OF_TIME = 124
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Told(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def tell(number: int, _frame: object) -> None:
    raise Told(number)


def descendants() -> list[int]:
    """The processes below this one, without those that have ended and were not waited for."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]  # its name may have spaces
        except OSError:
            continue  # it has just ended
        parents[int(entry.name)] = (int(parent), state)
    found, below = [], {os.getpid()}
    while below:
        below = {pid for pid, (parent, _) in parents.items() if parent in below}
        found += [pid for pid in below if parents[pid][1] not in "ZX"]
    return found


def end_descendants(seconds: float = 20) -> list[int]:
    """Kill them until there are none; returns those that the kernel still holds after some seconds."""
    end = time.monotonic() + seconds
    while left := descendants():
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > end:
            return left
        time.sleep(0.01)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
    return []


def main(seconds: float, command: list[str]) -> int:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, tell)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # it ends with what started it
    try:
        try:
            status = subprocess.Popen(command, start_new_session=True).wait(timeout=seconds)
            status = status if status >= 0 else 128 - status
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME
        except OSError as error:
            print(f"'{command[0]}' cannot be run: {error.strerror}", file=sys.stderr)
            status = 127
    except Told as told:
        status = 128 + told.number
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if left := end_descendants():
        print(f"could not be killed: processes {', '.join(map(str, left))}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
