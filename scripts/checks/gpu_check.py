# SPDX-License-Identifier: MIT
"""Runs the stages of gpu_check.sh, each in a process of its own that is ended with all of its children in time."""

import argparse
import datetime
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

from gpu import bench, build, profile, sanitize, tests, variants
from gpu.limit import OUT_OF_TIME
from gpu.report import LIMIT, ROOT, Clock, Report
from gpu.settings import Settings, SettingsError

STAGES: dict[str, Callable[[Report, Settings, Clock], int]] = {
    "build": build.run,
    "test": tests.run,
    "sanitize": sanitize.run,
    "atomics": bench.atomics,
    "bench-ops": bench.ops,
    "profile": profile.run,
    "variants": variants.run,
    "bench-models": bench.models,
}
IN_RESERVE = 20  # seconds between the end of a stage's own time and the limit
NO_GPU = 2


def supervise(report: Report, settings: Settings, names: list[str]) -> int:
    """Run stages one after the other, also after one that fails; but not without a GPU, where all would fail alike."""
    failed = False
    for name in names:
        command = [sys.executable, __file__, "--here", name]
        status = subprocess.run([sys.executable, str(LIMIT), str(settings.limit), *command]).returncode
        if status == NO_GPU:
            return NO_GPU
        if status == OUT_OF_TIME:
            report.write(f"\nOut of time: the stage was ended after {settings.limit:.0f} s.")
        elif status not in (0, 1):
            report.write(f"\nThe stage broke off, status {status}.")
        failed |= status != 0
    return int(failed)


def run(report: Report, settings: Settings, name: str) -> int:
    """Run a stage in this process."""
    clock = Clock(settings.limit - IN_RESERVE)
    try:
        import torch
    except ImportError as error:
        print(f"{sys.executable} has no torch ({error}); PYTHON selects the interpreter", file=sys.stderr)
        return NO_GPU
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return NO_GPU
    from gpu import machine

    # kernels that NVRTC compiles are kept from stage to stage, and not with those of the user
    os.environ.setdefault("INTERNIMAGE_CACHE", str(ROOT / "build" / "gpu-check" / "cache"))
    if not report.path.exists():
        report.write("# GPU checks\n\nMade by scripts/checks/gpu_check.sh.")
    now = datetime.datetime.now(datetime.timezone.utc)
    report.write(f"\n## {name}, {now:%Y-%m-%d %H:%M} UTC\n")
    report.write("\n".join(f"- {fact}" for fact in machine.facts()) + "\n")
    try:
        status = STAGES[name](report, settings, clock)
    except Exception as error:
        report.write(f"\nThe stage failed: {type(error).__name__}: {error}")
        traceback.print_exc()
        status = 1
    spent = settings.limit - IN_RESERVE - clock.left()
    report.write(f"\n{name}: {'failed' if status else 'done'}, {spent:.0f} s.")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--here", action="store_true", help="without supervision")
    arguments = parser.parse_args()
    try:
        settings = Settings.read(os.environ)
    except SettingsError as error:
        parser.exit(NO_GPU, f"{error}\n")
    report = Report(settings.report, settings.out / "gpu-check.log")
    if arguments.here:
        return run(report, settings, arguments.stage)
    return supervise(report, settings, list(STAGES) if arguments.stage == "all" else [arguments.stage])


if __name__ == "__main__":
    sys.exit(main())
