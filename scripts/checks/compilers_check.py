# SPDX-License-Identifier: MIT
"""The CPU kernels built by several compilers (GCC and Clang): the same tests pass, and none is much slower.

Each compiler builds the module through setup.py, the operator tests run on it, and then the builds are timed against
the first compiler's, with every instruction set that the processor has. The builds cannot be loaded into one process,
since both register the same operators: each has a process of its own, and the processes take turns, round after round,
so that a machine that slows down affects all of them. The clock is the CPU time of one thread.

Exits with 1 if a test fails or a build takes more than --tolerance longer than the first one (from the minima).
"""

import argparse
import csv
import datetime
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import zig
from abi_check import NEED_TORCHVISION, ROOT, build_module, operators_alone

COMPILERS = ["g++", "clang++", "zig"]
TESTS = [
    *("test_dcnv3.py", "test_cpu_kernels.py", "test_layer_norm.py", "test_gelu.py", "test_query.py", "test_block.py"),
    "test_deform_columns.py",
]
CAPABILITIES = ("default", "avx2", "avx512")
STAGES = [(56, 64, 4), (28, 128, 4), (14, 256, 18), (7, 512, 4)]  # side, channels, blocks of InternImage-T
GROUP_CHANNELS, BATCH = 16, 4
WORKS = ("forward", "backward", "layer norm")
DTYPES = ("float32", "bfloat16")
Key = tuple[str, str]  # work, dtype


# ---- the process of a build


def worker() -> None:
    """Time one call of everything for each line of standard input; answer with the seconds of each, in order."""
    import torch

    import internimage.ops  # noqa: F401  (loads the kernels)

    torch.set_num_threads(1)
    ops = torch.ops.internimage
    works = []
    for dtype in (torch.float32, torch.bfloat16):
        forward, backward, layer_norm = [], [], []
        for side, channels, _ in STAGES:
            generator = torch.Generator().manual_seed(0)
            groups = channels // GROUP_CHANNELS
            sizes = (channels, groups * 18, groups * 9, channels)
            input, offset, mask, grad = (
                torch.randn(BATCH, side, side, c, generator=generator).to(dtype) for c in sizes
            )
            weight, bias = torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
            inputs, geometry = (input, offset, mask), ([3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False, True)
            forward.append(partial(ops.dcnv3, *inputs, *geometry))
            backward.append(partial(ops.dcnv3_backward, grad, *inputs, *geometry, False, [True] * 3))
            layer_norm.append(partial(ops.layer_norm, input, weight, bias, 1e-6, grad, weight))
        works += [forward, backward, layer_norm]
    print(ops.cpu_capability(), flush=True)
    for _ in sys.stdin:
        answer = []
        for calls in works:
            total = 0.0
            for (_, _, blocks), run in zip(STAGES, calls):
                run()  # the previous call left other data in the caches
                start = time.thread_time()
                run()
                total += blocks * (time.thread_time() - start)
            answer.append(total)
        print(*answer, flush=True)


class Build:
    """A module in a process."""

    def __init__(self, package: Path, capability: str) -> None:
        variables = {"PYTHONPATH": str(package), "INTERNIMAGE_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=package,
        )
        self.capability = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("compilers_check: the process of a build ended")
        return line.strip()

    def round(self) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [float(word) for word in self._line().split()]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- the check


def name_of(command: str) -> str:
    """The compiler's name and version, from the first line of --version."""
    words = shlex.split(command)
    result = subprocess.run([*words, "--version"], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"compilers_check: '{command}' cannot be run: {result.stderr.strip()}")
    return result.stdout.splitlines()[0].strip()


def build(command: str, work: Path) -> Path:
    """The module, built by a compiler: a command line, which may have arguments."""
    work.mkdir(parents=True, exist_ok=True)
    compiler = str(zig.program(work / "compiler", "c++", shlex.split(command)))
    variables = {"CC": compiler, "CXX": compiler, "INTERNIMAGE_BUILD_CUDA": "0"}
    variables |= {"LDSHARED": f"{compiler} -shared", "LDCXXSHARED": f"{compiler} -shared"}
    return build_module(Path(sys.executable), os.environ | variables, work)


def tests_pass(package: Path, work: Path, pytest: list[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not {NEED_TORCHVISION}", *pytest]
    tests = [ROOT / "tests" / name for name in TESTS]
    return subprocess.run([*command, *tests], env=os.environ | {"PYTHONPATH": str(package)}, cwd=work).returncode == 0


def compare(packages: dict[str, Path], capability: str, rounds: int) -> dict[str, dict[Key, list[float]]] | None:
    """Compiler -> work and dtype -> seconds of each round; None if the processor lacks the instruction set."""
    builds = {name: Build(package, capability) for name, package in packages.items()}
    keys = [(work, dtype) for dtype in DTYPES for work in WORKS]
    seconds: dict[str, dict[Key, list[float]]] = {name: {key: [] for key in keys} for name in builds}
    try:
        if any(one.capability != capability for one in builds.values()):
            return None
        for number in range(rounds + 1):
            order = list(builds) if number % 2 else list(builds)[::-1]
            for name in order:
                for key, value in zip(keys, builds[name].round()):
                    if number > 0:  # the first is for warming up
                        seconds[name][key].append(value)
    finally:
        for one in builds.values():
            one.close()
    return seconds


def rows_of(seconds: dict[str, dict[Key, list[float]]], capability: str) -> list[dict[str, object]]:
    """Rows of the table: the milliseconds of each compiler, and their ratio to the first one's."""
    first = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        for key, values in times.items():
            least, median = min(values), statistics.median(values)
            rows.append(
                {
                    "compiler": name,
                    "capability": capability,
                    "work": key[0],
                    "dtype": key[1],
                    "min_ms": f"{1e3 * least:.4g}",
                    "median_ms": f"{1e3 * median:.4g}",
                    "min_ratio": f"{least / min(first[key]):.3f}",
                    "median_ratio": f"{median / statistics.median(first[key]):.3f}",
                    "rounds": len(values),
                }
            )
    return rows


def slower(rows: list[dict[str, object]], tolerance: float) -> list[str]:
    """The rows whose time, from the minima, exceeds the first compiler's by more than the tolerance."""
    return [
        f"{row['compiler']}, {row['capability']}, {row['work']} in {row['dtype']}: {row['min_ratio']}"
        for row in rows
        if float(str(row["min_ratio"])) > 1 + tolerance
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compilers",
        nargs="+",
        default=COMPILERS,
        metavar="COMMAND",
        help="the first is compared to; zig is ziglang's",
    )
    parser.add_argument("--modules", nargs="+", type=Path, metavar="FILE", help="modules of --compilers, built before")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "compilers", help="folder for the builds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--no-tests", action="store_true", help="only time the builds")
    parser.add_argument("--pytest", nargs="*", default=[], metavar="ARGUMENT", help="for pytest, such as -k=golden")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return 0
    if arguments.modules and len(arguments.modules) != len(arguments.compilers):
        parser.error("--modules must name one file per compiler")
    arguments.compilers = [
        shlex.join(zig.command(zig.LINUX[platform.machine()])) if c == "zig" else c for c in arguments.compilers
    ]
    missing = [c for c in arguments.compilers if shutil.which(shlex.split(c)[0]) is None]
    if missing:
        sys.exit(f"compilers_check: not installed: {', '.join(missing)}")
    packages, failed = {}, []
    for number, command in enumerate(arguments.compilers):
        name, work = name_of(command), arguments.work.resolve() / str(number)
        module = arguments.modules[number].resolve() if arguments.modules else build(command, work)
        if name in packages:  # two builds of one compiler
            name = f"{name} ({number + 1})"
        print(f"{name}: {module.stat().st_size} bytes", flush=True)
        packages[name] = operators_alone(module, work)
        if not arguments.no_tests and not tests_pass(packages[name], work, arguments.pytest):
            failed.append(f"tests of the build by {name}")
    rows: list[dict[str, object]] = []
    for capability in arguments.capabilities:
        seconds = compare(packages, capability, arguments.rounds)
        if seconds is None:
            print(f"{capability}: this processor lacks it")
            continue
        rows += rows_of(seconds, capability)
    for row in rows:
        print(" ".join(f"{row[column]!s:>9}" for column in list(row)[1:]), row["compiler"])
    if arguments.csv and rows:
        append(arguments.csv, rows)
    failed += slower(rows, arguments.tolerance)
    print(f"\nfailed: {'; '.join(failed)}" if failed else f"\nwithin {arguments.tolerance:.0%} of the first compiler")
    return 1 if failed else 0


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Append the rows to a CSV file, with the date, the machine and the versions."""
    import torch

    from internimage.benchmark.timing import processor

    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    facts = {"date": date, "machine": processor(), "torch": torch.__version__, "batch": BATCH}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
