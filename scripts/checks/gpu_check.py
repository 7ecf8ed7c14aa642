# SPDX-License-Identifier: MIT
"""The stages of gpu_check.sh: build, test, sanitize, bench-ops, bench-models. Each appends a section to the report.

A stage that cannot run reports why; a stage that fails ends with status 1. If a stage runs out of time, the report has
what it printed until then.
"""

import argparse
import concurrent.futures
import datetime
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_TESTS = 5  # pytest's exit status if no tests are selected
SECONDS = 450  # of the 480 that gpu_check.sh gives
# Tests for the sanitizers: all code paths of the kernels on small tensors, as each launch becomes 100 times slower.
SANITIZED = "test_golden and operator and (float32 or float64) or test_half or test_one_pixel or test_gradients_of_some"


TESTS = {  # what -> pytest's -m, and variables
    "Tests that use the GPU": ("gpu and not slow", {}),
    "Tests that use the GPU, with the kernels that NVRTC compiles": ("gpu and not slow", {"INTERNIMAGE_NVRTC": "1"}),
    "Large tensors": ("gpu and slow", {}),
    "The others": ("not gpu and not slow", {}),  # on the CPU, in several processes
}


def output_of(*command: str) -> str:
    """The output of a program; empty if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    except OSError:
        return ""


def facts() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    commit = output_of("git", "rev-parse", "--short", "HEAD").strip()
    return [
        ", ".join(f"{g.name} ({g.multi_processor_count} multiprocessors, {g.total_memory >> 30} GiB)" for g in gpus),
        f"driver {driver[0] if driver else 'unknown'}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"Python {platform.python_version()}, commit {commit or 'unknown'}",
    ]


class Report:
    """Appends to a file and prints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, text: str = "") -> None:
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(
        self, command: list[str], tail: int | None = None, seconds: float = SECONDS, **variables: str
    ) -> int | None:
        """Run a command and add its output, or the last lines, to the report. Returns its status; None on timeout."""
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **variables},
            cwd=ROOT,
            start_new_session=True,  # so that its children can be killed with it
        )
        lines = []

        def collect() -> None:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if tail is None:
                    self.write(lines[-1])

        collector = threading.Thread(target=collect, daemon=True)
        collector.start()
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        collector.join(timeout=10)
        if tail is not None:
            self.write("```\n" + "\n".join(lines[-tail:]) + "\n```")
        self.output = "\n".join(lines)
        return status


def loads() -> str:
    """Why the CUDA kernels are not in use; empty if they are."""
    code = "import internimage; from internimage.extension import backend; print(backend('dcnv3', 'cuda'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return "" if "compiled kernel" in result.stdout else (result.stdout + result.stderr)[-500:]


def peers(arguments: argparse.Namespace) -> list[str]:
    return [w for name in ("official", "dcnv4") if (path := getattr(arguments, name)) for w in (f"--{name}", str(path))]


def build(report: Report, arguments: argparse.Namespace) -> int:
    status = build_ours(report)
    if peers(arguments):
        report.write("\nPeers:\n")
        command = [sys.executable, "scripts/bench/cuda_peers.py", *peers(arguments)]
        if report.run(command, seconds=SECONDS - 100) is None:
            report.write("Timed out.")
    return status


def build_ours(report: Report) -> int:
    existing = sorted(path.name for path in (ROOT / "internimage").glob("_C_cuda*.so"))
    if existing and not loads():
        report.write(f"`{existing[0]}` exists and loads: not built.")
        return 0
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME") and not loads():
        report.write("There is no nvcc: the kernels are compiled by NVRTC when they are first needed.")
        return 0
    import torch

    major, minor = torch.cuda.get_device_capability()
    start = time.monotonic()
    status = report.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        tail=15,
        INTERNIMAGE_BUILD_CUDA="1",
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
    )
    reason = loads()
    report.write(f"Built in {time.monotonic() - start:.0f} s, status {status}. {reason or 'The kernels load.'}")
    return int(status != 0 or bool(reason))


def test(report: Report, _) -> int:
    """The whole test suite, starting with the tests that use the GPU in case the time does not suffice for all."""
    reason = loads()
    if reason:
        report.write(f"Not run: the CUDA kernels are not in use. {reason}")
        return 1
    end, failed = time.monotonic() + SECONDS, False
    for what, (selection, variables) in TESTS.items():
        report.write(f"\n{what}:\n")
        parts = [["tests"]] if selection.startswith("gpu") else shares(max(1, min(8, (os.cpu_count() or 1) // 2)))
        threads = str(max(1, (os.cpu_count() or 1) // len(parts)))

        def run(part: list[str], selection=selection, threads=threads, variables=variables) -> int | None:
            seconds = end - time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rsfE", "-m", selection, *part]
            if seconds < 5:
                return None
            return report.run(command, tail=12, seconds=seconds, OMP_NUM_THREADS=threads, **variables)

        with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
            statuses = list(pool.map(run, parts))
        done = all(status in (0, NO_TESTS) for status in statuses)
        report.write("Timed out." if None in statuses else "All passed." if done else f"Status {statuses}.")
        failed |= not done
    return int(failed)


def shares(count: int) -> list[list[str]]:
    """The test files, distributed over processes, largest first."""
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    return [[str(path.relative_to(ROOT)) for path in files[i::count]] for i in range(count)]


def sanitize(report: Report, _) -> int:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        report.write("not available: there is no compute-sanitizer.")
        return 0
    failed = False
    for name in ("memcheck", "racecheck"):
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/test_dcnv3.py",
            "-m",
            "gpu",
        ]
        options = ["--tool", name, "--error-exitcode", "99", "--target-processes", "all"]
        report.write(f"\n{name}:\n")
        status = report.run(
            [tool, *options, *tests, "-k", SANITIZED],
            tail=12,
            seconds=SECONDS / 2 - 5,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        summary = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", report.output)
        if re.search(r"not supported|Unable to|insufficient|permission", report.output, re.I) and not summary:
            report.write("not available: the driver does not permit it.")
        elif status is None:
            report.write("Timed out.")
        else:
            report.write(summary[-1] if summary else f"Status {status}.")
            failed |= status != 0
    return int(failed)


def bench(what: str):
    def run(report: Report, arguments: argparse.Namespace) -> int:
        command = [sys.executable, "scripts/bench/bench_cuda.py", what, "--budget", str(SECONDS - 80)]
        command += (
            peers(arguments) if what == "ops" else peers(argparse.Namespace(official=arguments.official, dcnv4=None))
        )
        status = report.run(command)
        if status is None:
            report.write("\nTimed out.")
        return int(status not in (0, None))

    return run


STAGES = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench-ops": bench("ops"),
    "bench-models": bench("models"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--dcnv4", type=Path)
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        parser.exit(2, f"{sys.executable} has no torch ({error}); PYTHON selects the interpreter\n")
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU: torch.cuda.is_available() is False\n")
    report = Report(arguments.report)
    if not arguments.report.exists():
        report.write("# GPU checks\n\nMade by scripts/checks/gpu_check.sh.")
    now = datetime.datetime.now(datetime.timezone.utc)
    report.write(f"\n## {arguments.stage}, {now:%Y-%m-%d %H:%M} UTC\n")
    report.write("\n".join(f"- {fact}" for fact in facts()) + "\n")
    return STAGES[arguments.stage](report, arguments)


if __name__ == "__main__":
    sys.exit(main())
