# SPDX-License-Identifier: MIT
"""Stage test: the tests that use the GPU, with nvcc's kernels and with NVRTC's."""

import collections
import os
import re
import sys

from . import build, machine
from .report import ROOT, Clock, Report, Running, verdict
from .settings import Settings

NO_TESTS = 5  # pytest's exit status if no tests are selected
RESULT = re.compile(r"^(?:\[gw\d+\].*\] )?(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|^(ERROR) (\S+)")
SECONDS = 15  # less is not worth a start
SHOWN = 40  # tests that failed
PYTEST = [
    *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-rfE"),
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
        seconds = clock.left() * share - 5
        if seconds < SECONDS:
            report.write("Not run: out of time.")
            failed = True
            continue
        failed |= not judge(report, report.run([*PYTEST, "-m", selection, "tests"], seconds, tail=3, **variables))
    if settings.cpu_tests:
        report.write("\nTests that use no GPU:\n")
        failed |= not on_the_cpu(report, clock)
    build.finish_peers(report, peers)
    if not tested:
        report.write("\nNo CUDA kernels are in use: nothing was tested.")
    return int(failed or not tested)


def judge(report: Report, *ended: Running) -> bool:
    """Say how pytest ended; whether all tests passed."""
    results = [found for running in ended for line in running.lines if (found := RESULT.match(line))]
    counts = collections.Counter(found[2] or found[3] for found in results)
    report.write(", ".join(f"{count} {result.lower()}" for result, count in counts.items()) or "No tests.")
    bad = dict.fromkeys(found[1] or found[4] for found in results if (found[2] or found[3]) in ("FAILED", "ERROR"))
    for name in list(bad)[:SHOWN]:
        report.write(f"- {name}")
    if len(bad) > SHOWN:
        report.write(f"- and {len(bad) - SHOWN} others, in the log")
    problems = [
        problem for running in ended if running.process.returncode != NO_TESTS and (problem := verdict(running))
    ]
    report.write(f"\n{' '.join(dict.fromkeys(problems)) or ('All passed.' if counts else '')}".rstrip())
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
