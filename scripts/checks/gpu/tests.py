# SPDX-License-Identifier: MIT
"""Stage test: the tests that use the GPU, with nvcc's kernels and with NVRTC's."""

import os
import sys

from . import build, machine
from .report import ROOT, Clock, Report, Running, verdict
from .settings import Settings

NO_TESTS = 5  # pytest's exit status if no tests are selected
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rsfE"),
    "--continue-on-collection-errors",  # what cannot be imported here must not keep the others from running
]
# what, pytest's -m, INTERNIMAGE_NVRTC, share of the time that is left when it starts
TESTS = [
    ("With the kernels that nvcc has compiled", "gpu and not slow", "0", 0.5),
    ("With the kernels that NVRTC compiles", "gpu and not slow", "1", 0.7),
    ("Large tensors", "gpu and slow", "", 1.0),
]


def run(report: Report, settings: Settings, clock: Clock) -> int:
    peers = build.start_peers(report, settings, clock.left() - 5)
    failed = tested = False
    for what, selection, nvrtc, share in TESTS:
        report.write(f"\n{what}:\n")
        variables = {"INTERNIMAGE_NVRTC": nvrtc} if nvrtc else {}
        served = machine.backend(**variables)
        if not machine.is_compiled(served):
            report.write(f"Not run: {served}.")
            continue
        tested = True
        command = [*PYTEST, "-m", selection, "tests"]
        failed |= not judge(report, report.run(command, clock.left() * share - 5, tail=15, **variables))
    if settings.cpu_tests:
        report.write("\nTests that use no GPU:\n")
        failed |= not on_the_cpu(report, clock)
    build.finish_peers(report, peers)
    if not tested:
        report.write("\nNo CUDA kernels are in use: nothing was tested.")
    return int(failed or not tested)


def judge(report: Report, *ended: Running) -> bool:
    """Say how pytest ended; whether all tests passed."""
    problems = [
        problem for running in ended if running.process.returncode != NO_TESTS and (problem := verdict(running))
    ]
    report.write(" ".join(dict.fromkeys(problems)) or "All passed.")
    return not problems


def on_the_cpu(report: Report, clock: Clock) -> bool:
    """In several processes, each with some of the files, largest first."""
    processors = os.cpu_count() or 1
    count = max(1, min(8, processors // 2))
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    started = [
        report.start(
            [*PYTEST, "-m", "not gpu and not slow", *(str(path.relative_to(ROOT)) for path in files[i::count])],
            clock.left() - 5,
            OMP_NUM_THREADS=str(max(1, processors // count)),
        )
        for i in range(count)
    ]
    for running in started:
        running.wait()
        report.write("```\n" + "\n".join(running.lines[-12:]) + "\n```")
    return judge(report, *started)
