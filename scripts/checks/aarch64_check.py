# SPDX-License-Identifier: MIT
"""Check that the CPU kernels compile for aarch64 without warnings and are vectorized; needs Debian's cross compiler.

With --torch, a folder into which an aarch64 wheel of torch was unpacked, the module is linked as well.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from abi_check import ROOT, TORCH_TARGET

COMPILER = "aarch64-linux-gnu-g++"
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
FUSED = re.compile(r"\sfml[as]\s+v\d+\.(4s|2d)")  # multiply-add of whole vectors
LIBRARIES = ["-lc10", "-ltorch", "-ltorch_cpu"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "aarch64", help="folder for the build")
    parser.add_argument("--torch", type=Path, metavar="FOLDER", help="torch for aarch64, to link against")
    arguments = parser.parse_args()
    if shutil.which(COMPILER) is None:
        sys.exit(f"aarch64_check: there is no {COMPILER}; `apt-get install g++-aarch64-linux-gnu` installs it")
    arguments.work.mkdir(parents=True, exist_ok=True)
    headers = Path(sysconfig.get_path("purelib"), "torch", "include")
    objects, fused = [], 0
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        objects.append(arguments.work / f"{source.parent.name}_{source.stem}.o")
        command = [COMPILER, *FLAGS, "-Wall", "-isystem", headers, "-c", source, "-o", objects[-1]]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if result.returncode != 0 or "warning:" in result.stderr:
            sys.exit(f"{result.stderr}\naarch64_check: {source.name} does not compile without warnings")
        listing = subprocess.run(
            ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", objects[-1]], capture_output=True, text=True
        )
        fused += len(FUSED.findall(listing.stdout))
    print(f"{len(objects)} sources compile for aarch64; {fused} vector multiply-adds")
    if fused == 0:
        sys.exit("aarch64_check: there are no vector multiply-adds")
    if arguments.torch:
        folder = arguments.torch / "torch" / "lib"
        schema = [each for each in objects if each.name == "csrc_schema.o"]
        for name, parts in (("_C", [each for each in objects if each not in schema]), ("_schema", schema)):
            module = arguments.work / f"{name}.abi3.so"
            link = [COMPILER, "-shared", *parts, f"-L{folder}", *LIBRARIES, "-Wl,--allow-shlib-undefined", "-o", module]
            subprocess.run(link, check=True)
            print(f"linked {os.path.relpath(module)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
