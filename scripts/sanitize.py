# SPDX-License-Identifier: MIT
"""The operator tests on a build of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Linux).

Reads and writes past an array, overflows of signed integers, misaligned accesses and the like end the test run with a
report. Leaks are not looked for: Python leaves much behind on purpose.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from abi_check import NEED_TORCHVISION, ROOT, build_module, operators_alone

# -fwrapv is among Python's own flags, and makes overflows defined; vptr would ask for torch's type information
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -fno-wrapv -g1"
)
TESTS = ["test_dcnv3_properties.py", "test_cpu_kernels.py", "test_dcnv3.py"]
NOT_THESE = [NEED_TORCHVISION, "compile", "export", "stable_abi"]  # torch's compiler; and the sanitizers' own symbols


def library(name: str) -> str:
    """A library of the compiler, which is to be loaded before everything else."""
    command = [*os.environ.get("CXX", "g++").split(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {command[0]} has no {name}; install the compiler's sanitizer libraries")
    return str(Path(path).resolve())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sanitize", help="folder for the build")
    parser.add_argument("--pytest", nargs="*", default=[], metavar="ARGUMENT", help="for pytest, such as -k=golden")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    preload = [library("libasan.so"), library("libstdc++.so")]  # the latter, so that exceptions are seen
    flags = {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined"}
    module = build_module(Path(sys.executable), {**os.environ, **flags}, work)
    environment = {
        **os.environ,
        "PYTHONPATH": str(operators_alone(module, work)),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    print(f"{module.name}, sanitized, loaded behind {', '.join(Path(path).name for path in preload)}", flush=True)
    selection = ["-k", "not (" + " or ".join(NOT_THESE) + ")", *arguments.pytest]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys", "--timeout=1800"]
    tests = [ROOT / "tests" / name for name in TESTS]
    return subprocess.run([*command, *selection, *tests], env=environment, cwd=work).returncode


if __name__ == "__main__":
    sys.exit(main())
