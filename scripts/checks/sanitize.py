# SPDX-License-Identifier: MIT
"""The operator tests on builds of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Linux).

Out-of-bounds accesses, signed integer overflows, misaligned accesses and the like end the tests with a report. Leaks
are not checked, since Python leaks on purpose. There are two builds, because with both sanitizers in one, the compiler
takes a quarter of an hour for each instruction set.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from abi_check import NEED_TORCHVISION, ROOT, build_module, operators_alone

COMMON = "-O1 -g1 -fno-sanitize-recover=all -fno-omit-frame-pointer"
# -fwrapv, one of Python's own flags, makes overflows defined. vptr would need torch's type information; object-size
# checks array bounds, as AddressSanitizer does, and takes long to compile.
FLAGS = {
    "address": "-fsanitize=address",
    "undefined": "-fsanitize=undefined -fno-sanitize=vptr,object-size -fno-wrapv",
}
LIBRARIES = {"address": "libasan.so", "undefined": "libubsan.so"}
TESTS = [
    *("test_dcnv3.py", "test_dcnv3_properties.py", "test_cpu_kernels.py"),
    *("test_layer_norm.py", "test_gelu.py", "test_query.py", "test_block.py"),
    *("test_deform_columns.py", "test_deform_conv_edges.py"),
]
NOT_THESE = [
    NEED_TORCHVISION,
    "compile",
    "export",
    "stable_abi",
]


def library(name: str) -> str:
    """A library of the compiler, to be preloaded."""
    command = [*os.environ.get("CXX", "g++").split(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {command[0]} has no {name}; install the compiler's sanitizer libraries")
    return str(Path(path).resolve())


def check(sanitizer: str, work: Path, pytest: list[str]) -> bool:
    """Build with one of the sanitizers and run the tests; returns whether they passed."""
    work.mkdir(parents=True, exist_ok=True)
    preload = [library(LIBRARIES[sanitizer]), library("libstdc++.so")]  # libstdc++ so that exceptions are intercepted
    flags = f"{COMMON} {FLAGS[sanitizer]}"
    variables = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": f"-fsanitize={sanitizer}"}
    start = time.monotonic()
    module = build_module(Path(sys.executable), os.environ | variables | {"INTERNIMAGE_BUILD_CUDA": "0"}, work)
    seconds = time.monotonic() - start
    names = ", ".join(Path(path).name for path in preload)
    print(f"\n== {module.name} with sanitizer '{sanitizer}', built in {seconds:.0f} s, preloading {names}", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(operators_alone(module, work)),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    selection = ["-k", "not (" + " or ".join(NOT_THESE) + ")", *pytest]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys", "--timeout=1800"]
    tests = [ROOT / "tests" / name for name in TESTS]
    return subprocess.run([*command, *selection, *tests], env=environment, cwd=work).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sanitize", help="folder for the builds")
    parser.add_argument("--only", choices=sorted(FLAGS), help="only one of the two")
    parser.add_argument("--pytest", nargs="*", default=[], metavar="ARGUMENT", help="for pytest, such as -k=golden")
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else sorted(FLAGS)
    failed = [name for name in chosen if not check(name, arguments.work.resolve() / name, arguments.pytest)]
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\nno errors found: {', '.join(chosen)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
