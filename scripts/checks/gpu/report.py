# SPDX-License-Identifier: MIT
"""The report: what a stage finds, written as it is found, so that it is there whatever becomes of the stage."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .limit import OUT_OF_TIME

ROOT = Path(__file__).resolve().parents[3]
LIMIT = Path(__file__).with_name("limit.py")


class Clock:
    """The time that a stage has."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


class Running:
    """A command that `Report.start` has started."""

    def __init__(self, process: subprocess.Popen, seconds: float, on_line: Callable[[str], None]) -> None:
        self.process, self.seconds, self.lines = process, seconds, []

        def collect() -> None:
            for line in process.stdout:
                self.lines.append(line.rstrip("\n"))
                on_line(self.lines[-1])

        self._collector = threading.Thread(target=collect, daemon=True)
        self._collector.start()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait(self) -> int:
        """Its status; OUT_OF_TIME if its time was over."""
        status = self.process.wait()  # limit.py sees to it that this does not take longer
        self._collector.join(timeout=10)
        return status


class Report:
    """Appends to a Markdown file and prints; the whole output of commands goes to a file of its own.

    Attributes:
        path: The Markdown file.
        log: The file with the output of commands.
    """

    def __init__(self, path: Path, log: Path) -> None:
        self.path, self.log = path, log
        self._lock = threading.Lock()
        for file in (path, log):
            file.parent.mkdir(parents=True, exist_ok=True)

    def write(self, text: str = "") -> None:
        with self._lock:
            print(text, flush=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _keep(self, text: str) -> None:
        with self._lock, self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def start(
        self, command: Sequence[str], seconds: float, on_line: Callable[[str], None] | None = None, **variables: str
    ) -> Running:
        """Start a command whose processes are all dead after so many seconds.

        Args:
            command: The program and its arguments.
            seconds: How long it may take.
            on_line: Called with each line of its output as it comes.
            **variables: Of its environment.
        """
        self._keep(f"\n$ {' '.join(f'{k}={v}' for k, v in variables.items())} {' '.join(command)}".replace("$  ", "$ "))

        def take(line: str) -> None:
            self._keep(line)
            if on_line is not None:
                on_line(line)

        process = subprocess.Popen(
            [sys.executable, str(LIMIT), f"{max(1.0, seconds):.0f}", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **variables},
            cwd=ROOT,
        )
        return Running(process, seconds, take)

    def run(self, command: Sequence[str], seconds: float, tail: int | None = None, **variables: str) -> Running:
        """Run a command and add its output, or the last lines of it, to the report."""
        running = self.start(command, seconds, self.write if tail is None else None, **variables)
        running.wait()
        if tail is not None:
            self.write("```\n" + "\n".join(running.lines[-tail:]) + "\n```")
        return running


def verdict(running: Running) -> str:
    """How a command ended, in words; empty if it succeeded."""
    status = running.process.returncode
    if status == OUT_OF_TIME:
        return f"Out of time: ended after {running.seconds:.0f} s."
    if status > 128:
        return f"Ended by signal {status - 128}."
    return "" if status == 0 else f"Status {status}."
