# SPDX-License-Identifier: MIT
"""Stage sanitize: compute-sanitizer on the tests of DCNv3.

memcheck finds accesses outside of tensors, initcheck reads of memory that nothing has written. racecheck looks at
shared memory alone, which no kernel but those of INTERNIMAGE_CUDA_VARIANTS uses: it runs with RACECHECK=1, on these.
"""

import re
import sys

from . import machine, variants
from .report import Clock, Report, verdict
from .settings import Settings

# All code paths of the kernels on small tensors, as each launch becomes 100 times slower.
TESTS = "test_golden and operator and (float32 or float64) or test_half or test_one_pixel or test_gradients_of_some"
OURS = re.compile(r"internimage::cuda|(forward|backward\w*|deterministic|tiles|window|fixed_\w+)_kernel")
SECONDS = 60  # less is not worth a start


def run(report: Report, settings: Settings, clock: Clock) -> int:
    tool = machine.tool("compute-sanitizer")
    if tool is None:
        report.write("not available: there is no compute-sanitizer.")
        return 0
    served = machine.backend()
    if not machine.is_compiled(served):
        report.write(f"Not run: {served}.")
        return 1
    plan = [("memcheck", {}), ("initcheck", {})]
    if settings.racecheck:
        unknown = variants.unknown()
        if unknown:
            report.write(f"racecheck: not run. {unknown}")
        else:
            plan.insert(1, ("racecheck", {variants.VARIABLE: ",".join(variants.NAMES)}))
    failed = False
    for i, (name, variables) in enumerate(plan):
        report.write(f"\n{name}:\n")
        if i and clock.left() < SECONDS:
            report.write("Not run: out of time.")
            continue
        command = [tool, "--tool", name, "--error-exitcode", "99", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short"]
        command += ["tests/test_dcnv3.py", "-m", "gpu", "-k", TESTS]
        # the first may take all but what the last needs at least
        seconds = clock.left() - 5 if i == len(plan) - 1 else max(SECONDS, clock.left() - SECONDS - 10)
        running = report.run(command, seconds, tail=12, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **variables)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", running.output)
        if not summary and re.search(r"not supported|Unable to|insufficient|permission", running.output, re.I):
            report.write("not available: the driver does not permit it.")
            continue
        report.write(" ".join(filter(None, [summary[-1] if summary else "No summary.", verdict(running)])))
        in_ours = any(OURS.search(line) for line in running.lines if "=========" in line)
        if running.process.returncode == 99 and name == "initcheck" and not in_ours:
            report.write("None of it is in our kernels.")  # torch's own are not ours to judge
        else:
            failed |= running.process.returncode not in (0, 124)
    return int(failed)
