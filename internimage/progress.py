# SPDX-License-Identifier: MIT
"""Progress of long jobs: a bar on a terminal, an occasional line in a log file. All of it goes to stderr."""

import logging
import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from .terminal import encoded, joined, say

SECONDS = 30.0  # between two lines in a log file


def on_terminal() -> bool:
    """Whether stderr is a terminal, where a line can be redrawn."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is no stderr, or it is closed
        return False


def message(text: str) -> None:
    """Print a line on stderr, like `terminal.say`, above a bar that is being drawn there."""
    if sys.stderr is not None:
        tqdm.write(encoded(text, sys.stderr), file=sys.stderr)  # the default, stdout, is for results


class MessageHandler(logging.Handler):
    """Prints log records on the current stderr. In a torchrun launch, only the first process prints warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0" or record.levelno >= logging.ERROR:
            message(joined(self.format(record)))


class ProgressLines:
    """The interface of `tqdm` for log files, where each frame would be a line: prints one every SECONDS."""

    def __init__(self, total: int | None, desc: str, unit: str, initial: int, unit_scale: bool) -> None:
        self.total, self.desc = total, desc
        self.n: float = initial
        self._name, self._scaled, self._initial, self._postfix = unit, unit_scale, initial, ""
        self._start = self._printed = time.monotonic()

    def update(self, n: float = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self._printed >= SECONDS:
            self._printed = now
            message(self._line(now - self._start))

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Print another line about the same job, which postpones the next progress line."""
        self._printed = time.monotonic()
        say(text, file)

    def _line(self, elapsed: float) -> str:
        """For example `evaluate: 64 %, 32000 of 50000 img, 510 img/s, 00:35 left, top1=83.1`."""
        rate = (self.n - self._initial) / elapsed if elapsed > 0 else 0.0
        if self.total:
            parts = [f"{100 * self.n / self.total:.0f} %", f"{self._count(self.n)} of {self._unit(self.total)}"]
        else:
            parts = [self._unit(self.n)]
        parts.append(f"{self._unit(rate)}/s")
        if self.total and rate > 0:
            parts.append(f"{tqdm.format_interval(max(self.total - self.n, 0) / rate)} left")
        if self._postfix:
            parts.append(self._postfix)
        return f"{self.desc}: {', '.join(parts)}"

    def _count(self, value: float) -> str:
        return tqdm.format_sizeof(value) if self._scaled else f"{value:.3g}" if value < 100 else f"{value:.0f}"

    def _unit(self, value: float) -> str:
        return self._count(value) + ("" if self._scaled else " ") + self._name

    def set_description(self, desc: str, refresh: bool = True) -> None:
        self.desc = desc

    def set_postfix(self, refresh: bool = True, **values: object) -> None:
        self._postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def close(self) -> None:
        pass

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(
    total: int | None,
    desc: str,
    unit: str = "it",
    *,
    shown: bool = True,
    initial: int = 0,
    leave: bool = True,
    unit_scale: bool = False,
    delay: float = 0.0,
) -> "tqdm[Any] | ProgressLines":
    """A progress bar on a terminal; otherwise a stand-in with the same methods, which prints a line every 30 seconds.

    Args:
        total: Number of units in total; None if unknown.
        desc: Name of the job.
        unit: Name of a unit, such as "img".
        shown: False shows nothing, for quiet callers and all but the first process of a torchrun launch.
        initial: Number of units already done.
        leave: Keep the bar on the terminal after the end.
        unit_scale: Abbreviate large numbers: 12.3M.
        delay: Seconds before a bar appears, for jobs that may be short.

    Returns:
        A context manager with `update`, `write`, `set_description`, `set_postfix`, `close`, `n` and `total`.
    """
    if shown and not on_terminal():
        return ProgressLines(total, desc, unit, initial, unit_scale)
    return tqdm(
        total=total, desc=desc, unit=unit, initial=initial, leave=leave, unit_scale=unit_scale, dynamic_ncols=True,
        disable=not shown, delay=delay,
    )  # fmt: skip
