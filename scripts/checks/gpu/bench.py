# SPDX-License-Identifier: MIT
"""Stages atomics, bench-ops and bench-models: the scripts of scripts/bench, whose tables come row by row."""

import sys

from . import build
from .report import Clock, Report, verdict
from .settings import Settings


def atomics(report: Report, settings: Settings, clock: Clock) -> int:
    """The rate of atomic additions, which bounds the backward."""
    return script(report, clock, "bench_atomics.py")


def ops(report: Report, settings: Settings, clock: Clock) -> int:
    """DCNv3 against the official kernels and DCNv4's."""
    build.finish_peers(report, build.start_peers(report, settings, 0.6 * clock.left()))
    return script(report, clock, "bench_cuda.py", "ops", "--built", *settings.peers("official", "dcnv4"))


def models(report: Report, settings: Settings, clock: Clock) -> int:
    """InternImage against other models, and on the official operator."""
    return script(report, clock, "bench_cuda.py", "models", "--built", *settings.peers("official"))


def script(report: Report, clock: Clock, name: str, *arguments: str) -> int:
    """Run one, with its output as part of the report. It starts nothing new in the last eighth of the time."""
    report.write()
    command = [sys.executable, f"scripts/bench/{name}", *arguments, "--budget", f"{clock.left() * 7 / 8:.0f}"]
    running = report.run(command, clock.left() - 3)
    if problem := verdict(running):
        report.write(f"\n{problem}")
    return int(running.process.returncode not in (0, 124))
