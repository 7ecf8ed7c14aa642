# SPDX-License-Identifier: MIT
"""Interleaved rounds of timed calls, facts about the machine, and rows as Markdown tables and CSV files.

All functions to be compared run in turn in one process, round after round, so that a machine that slows down affects
all of them. Other processes disturb CPU time least, of one thread or of a process with one for each runtime; of the
wall time of several threads, a round counts only if the rest of the machine was quiet.
"""

import csv
import datetime
import io
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from .. import __version__
from ..errors import UserError
from ..extension import cpu_capability
from ..files import appending, check_writable
from ..malloc import SETTINGS as MALLOC_SETTINGS

QUIET = 0.1  # number of cores that other processes may use during a round of wall times
HOW = "From the fastest round; in parentheses, from the median round."  # above the printed tables
Key = TypeVar("Key", bound=Hashable)  # identifies a timed function


class BenchmarkError(UserError, ValueError):
    """An implementation that is not available or computes something else, or a file that cannot take the rows."""


@dataclass(frozen=True)
class Clock:
    """How calls are timed."""

    # cpu: time.thread_time of the calling thread; process: time.process_time, of all threads; wall: time.perf_counter
    name: str
    threads: int

    def __call__(self) -> float:
        clocks = {"cpu": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
        return clocks[self.name]()


@dataclass
class Times(Generic[Key]):
    """The seconds of every call by function, and under which conditions they were measured."""

    clock: Clock
    seconds: dict[Key, list[float]] = field(default_factory=dict)
    rounds: int = 0
    others: float = float("nan")  # mean number of cores that other processes used during the rounds that count

    def pick(self, key: Key, how: str) -> float:
        """The "min" or the "median" of a function's times, in seconds."""
        return min(self.seconds[key]) if how == "min" else statistics.median(self.seconds[key])


def clocks(threads: Sequence[int]) -> list[Clock]:
    """For each number of threads its clock: the CPU time of one, the wall time of several."""
    return [Clock("cpu" if number == 1 else "wall", number) for number in threads]


def interleave(
    functions: Mapping[Key, Callable[[], object]], rounds: int, clock: Clock, settle: bool, name: str = ""
) -> Times[Key]:
    """Time the functions in turn, for `rounds` rounds after one of warm-up.

    A round of wall times counts if the rest of the machine was quiet. Up to three times as many are tried; if too few
    of these were quiet, the quietest are used, and `Times.others` tells how busy the machine was.

    Args:
        functions: Key -> function.
        rounds: Number of timed calls per function.
        clock: The clock; its number of threads is set in torch.
        settle: Precede each timed call by an untimed one, since the previous function left other data in the caches and
            other free blocks in malloc. For functions that take milliseconds.
        name: For the progress bar.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(clock.threads)
    taken: list[tuple[float, dict[Key, float]]] = []
    bar = tqdm(
        total=rounds, unit="round", desc=f"{name} {clock.name}", leave=False, disable=None
    )  # None: only on a terminal
    try:
        for function in functions.values():
            function()
        while len(taken) < rounds or (
            clock.name == "wall"
            and len(taken) < 3 * rounds
            and sum(not others > QUIET for others, _ in taken) < rounds  # NaN, for unknown, counts as quiet
        ):
            seconds: dict[Key, float] = {}
            with _Others() as others:
                for key, function in functions.items():
                    if settle:
                        function()
                    start = clock()
                    function()
                    seconds[key] = clock() - start
            taken.append((others.cores, seconds))
            bar.update()
    finally:
        bar.close()
        torch.set_num_threads(before)
    if clock.name == "wall":
        taken.sort(key=lambda entry: entry[0])
    kept = taken[:rounds]
    times: Times[Key] = Times(clock, rounds=rounds, others=statistics.mean(others for others, _ in kept))
    for key in functions:
        times.seconds[key] = [seconds[key] for _, seconds in kept]
    return times


class _Others:
    """Context that measures how many cores other processes use on average; NaN if the system does not provide that."""

    cores = float("nan")

    def __enter__(self) -> "_Others":
        self._start = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wall, own, busy = (b - a for a, b in zip(self._start, self._now()))
        cores = (busy - own) / max(wall, 1e-9)
        self.cores = 0.0 if cores < 0 else cores  # and not max(), which is undefined for NaN

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait
        except (OSError, ValueError, IndexError):
            busy = float("nan")
        return time.perf_counter(), time.process_time(), busy


# ---- facts about the machine


def facts(clock: Clock | None = None, times: Times[Any] | None = None) -> dict[str, object]:
    """The columns of a row that say where and how it was measured."""
    malloc = [f"{name}={os.environ[name]}" for name in MALLOC_SETTINGS if os.environ.get(name)]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "internimage": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "capability": cpu_capability() or "none",
        "malloc": " ".join(malloc) or "default",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "threads": clock.threads if clock else "",
        "clock": clock.name if clock else "",
        "rounds": times.rounds if times else "",
        "others": f"{times.others:.2f}" if times else "",
    }


def processor() -> str:
    """The model name of the processor on Linux, elsewhere the name of the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


# ---- rows


def significant(value: float, digits: int = 3) -> float:
    """`value` rounded to a number of significant digits."""
    return float(f"{value:.{digits}g}")


def append_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a CSV file; a new file gets a header.

    Raises:
        BenchmarkError: The file has other columns.
    """
    columns = list(rows[0])
    check_csv(path, columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    try:
        with appending(path) as file:
            if not path.is_file() or file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            file.write(text.getvalue().encode())
    except OSError as error:
        raise BenchmarkError(f"'{path}' cannot be written ({error.strerror or error})") from error


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Check that rows of these columns can be appended to a file, before an hour of measurements.

    Raises:
        BenchmarkError: The file has other columns, or is not a CSV file.
        UserError: It cannot be written to.
    """
    check_writable(path)
    if path.is_file() and path.stat().st_size > 0:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                there = next(csv.reader(file), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise BenchmarkError(f"'{path}' is not a CSV file ({error}); use a new file") from error
        if there != list(columns):
            differences = sorted(set(there) ^ set(columns)) or ["their order"]
            raise BenchmarkError(f"'{path}' has other columns ({', '.join(differences)}); use a new file")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], names: int) -> str:
    """A Markdown table with aligned columns: the first `names` columns to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def describe(about: Mapping[str, object]) -> str:
    """One line on how the rows of a table were measured."""
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    how = f"wall time with {threads}" if about["clock"] == "wall" else f"CPU time of {threads}"
    rounds = f"{about['rounds']} round{'' if about['rounds'] == 1 else 's'}"
    others = float(str(about["others"] or "nan"))
    loud = f", other processes used {others:.2f} cores" if about["clock"] == "wall" else ""
    if about["clock"] == "wall" and others > QUIET:
        loud += " (NOT quiet)"
    return (
        f"{how}, {rounds}{loud}; {about['machine']}, kernels: {about['capability']}, "
        f"torch {about['torch']}, malloc {about['malloc']}"
    )
