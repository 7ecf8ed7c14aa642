# SPDX-License-Identifier: MIT
"""How far a long job is: a bar on a terminal, a plain line now and then in a log file. All of it goes to stderr."""

import logging
import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from .terminal import encoded, joined, say

SECONDS = 30.0  # between two lines where there is no terminal


def on_terminal() -> bool:
    """Whether stderr is a terminal, which can draw a line over again."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr at all, or a closed one
        return False


def message(text: str) -> None:
    """Print a line on stderr, as `terminal.say` does; a bar that is being drawn there moves down."""
    if sys.stderr is not None:
        tqdm.write(encoded(text, sys.stderr), file=sys.stderr)  # its own default is stdout, which is for results


class MessageHandler(logging.Handler):
    """Log records as messages on today's stderr. Of a torchrun launch one process tells what all would warn of."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0" or record.levelno >= logging.ERROR:
            message(joined(self.format(record)))


class _Lines:
    """What `tqdm` does, as a line every SECONDS: in a file its frames would all stand one after the other."""

    def __init__(self, total: int | None, desc: str, unit: str, initial: int, unit_scale: bool) -> None:
        self.total, self.desc, self.n = total, desc, initial
        self._name, self._scaled, self._initial, self._postfix = unit, unit_scale, initial, ""
        self._start = self._told = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self._told >= SECONDS:
            self._told = now
            message(self._line(now - self._start))

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Another line about the same work, after which no line is due for a while."""
        self._told = time.monotonic()
        say(text, file)

    def _line(self, elapsed: float) -> str:
        """Such as `evaluate: 64 %, 32000 of 50000 img, 510 img/s, 00:35 left, top1=83.1`."""
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

    def __enter__(self) -> "_Lines":
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
) -> "tqdm | _Lines":
    """A progress bar on a terminal; elsewhere something with the same methods that prints a line every 30 seconds.

    Args:
        total: How much there is to do; None if that is not known.
        desc: What is being done.
        unit: What is counted, such as "img".
        shown: False shows nothing: the processes of a torchrun launch but the first, and callers that want quiet.
        initial: How much was done before.
        leave: The bar stays on the terminal after the end.
        unit_scale: Shorten large numbers: 12.3M.

    Returns:
        An object with `update`, `set_description`, `set_postfix`, `close`, `n` and `total`, and a context manager.
    """
    if shown and not on_terminal():
        return _Lines(total, desc, unit, initial, unit_scale)
    return tqdm(
        total=total, desc=desc, unit=unit, initial=initial, leave=leave, unit_scale=unit_scale, dynamic_ncols=True,
        disable=not shown,
    )  # fmt: skip
