# SPDX-License-Identifier: MIT
"""CUDA without a GPU: a runtime and a driver whose memory is the host's and whose launches are recorded (stand_in.c),
and what the launcher's C++ says of the kernels (layout.cpp)."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
C_COMPILER = shutil.which(os.environ.get("CC", "gcc"))
CPP_COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def layout() -> dict:
    """Names and argument sizes of all kernels, apart from them those of layouts that are not dense, and the offsets of
    the arguments' fields, by the host's compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "layout"
        source = str(FOLDER / "layout.cpp")
        subprocess.run([CPP_COMPILER, "-std=c++17", "-Wno-invalid-offsetof", source, "-o", str(program)], check=True)
        return json.loads(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)


def build(library: Path, headers: Path) -> Path:
    """The stand-in, to preload. `headers` are those of CUDA's runtime."""
    command = [C_COMPILER, "-shared", "-fPIC", "-O1", "-w", f"-I{FOLDER}", f"-I{headers}", str(FOLDER / "stand_in.c")]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-lpthread", "-o", str(library)], check=True)
    return library
