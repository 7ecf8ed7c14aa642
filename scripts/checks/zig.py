# SPDX-License-Identifier: MIT
"""zig's C++ compiler (`pip install ziglang`: Clang with the headers and the C library of every system)."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# The oldest glibc of a wheel: that of torch's own wheels, manylinux_2_28.
GLIBC = "2.28"
LINUX = {"x86_64": f"x86_64-linux-gnu.{GLIBC}", "aarch64": f"aarch64-linux-gnu.{GLIBC}"}


def command(target: str) -> list[str]:
    """The command that compiles and links C++ for a target, optimized and without debug information."""
    if importlib.util.find_spec("ziglang") is None:
        sys.exit("ziglang must be installed (`pip install ziglang`)")
    # -O3 is for linking, too: zig compiles its C++ runtime with it
    return [sys.executable, "-m", "ziglang", "c++", "-target", target, "-O3", "-g0", "-s"]


def program(folder: Path, name: str, words: Sequence[str]) -> Path:
    """A program that runs a command of several words: torch's build takes the compiler for one word."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)
    return path
