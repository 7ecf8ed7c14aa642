# SPDX-License-Identifier: MIT
"""The tests with the arithmetic of other machines: `make test-machines`.

Runs the tests with lower instruction sets for torch, oneDNN and our kernels, with other numbers of threads, and in
random order; those about files also as a user other than root. The table at the end has a row for each run. An
instruction set that this processor lacks is replaced by the best one that it has.

    python scripts/checks/machines_check.py [--only NAME ...] [further arguments for pytest]
"""

import argparse
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NUMERIC = [
    "test_cpu_kernels.py", "test_dcnv3.py", "test_dcnv3_properties.py", "test_distributed.py", "test_imagenet.py",
    "test_fused_block.py", "test_gelu.py", "test_layer_norm.py", "test_layers.py", "test_linear.py", "test_models.py",
    "test_models_goldens.py", "test_packing.py", "test_query.py", "test_training.py", "test_transforms.py",
]  # fmt: skip
FILES = [  # tests of permissions, locks, links, caches
    "test_atomic.py", "test_cli.py", "test_convert.py", "test_create.py", "test_damage.py", "test_data.py",
    "test_files.py", "test_hub.py", "test_hub_cache.py", "test_image_tars.py", "test_images.py", "test_kills.py",
    "test_load.py", "test_overwrite.py", "test_readers.py", "test_resume.py", "test_run_folder.py",
    "test_terminal.py", "test_unfinished.py",
]  # fmt: skip

# name -> environment, threads, tests (None: all), whether in random order
RUNS = {
    "portable": (
        dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", INTERNIMAGE_CPU_CAPABILITY="default"),
        1, NUMERIC, True,
    ),
    "avx2": (
        dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", INTERNIMAGE_CPU_CAPABILITY="avx2"),
        2, NUMERIC, True,
    ),
    "avx512": (dict(ONEDNN_MAX_CPU_ISA="AVX512_CORE", INTERNIMAGE_CPU_CAPABILITY="avx512"), 4, NUMERIC, True),
    "as-it-is": ({}, 2, None, True),
    "another-user": ({}, 1, FILES, False),
}  # fmt: skip
NOBODY = 65534


def command(name: str, seed: int, temporary: Path, more: list[str]) -> tuple[list[str], dict[str, str]] | str:
    """The command and the environment of a run, or why it is not possible."""
    variables, threads, files, shuffled = RUNS[name]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(temporary / "tests")]
    if shuffled:
        pytest += ["-p", "randomly", f"--randomly-seed={seed}", "--randomly-dont-reset-seed"]
    pytest += [str(ROOT / "tests" / file) for file in files] if files else [str(ROOT / "tests")]
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(temporary / "hypothesis")
    prefix = []
    if name == "another-user":
        environment |= {"HOME": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                return "needs setpriv (util-linux) to switch to a user other than root"
            prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            start = (
                "import subprocess, sys; subprocess.run([sys.executable, '--version'], check=True); open(sys.argv[1])"
            )
            tried = [*prefix, sys.executable, "-c", start, str(ROOT / "tests" / "conftest.py")]
            if subprocess.run(tried, capture_output=True).returncode:
                return f"users other than root cannot run '{sys.executable}' or read '{ROOT}'"
    return prefix + pytest + more, environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="only these runs")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="seed of the random order")
    arguments, more = parser.parse_known_args()
    rows = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="machines-") as folder:
            temporary = Path(folder)
            temporary.chmod(0o777)  # another user writes there as well
            prepared = command(name, arguments.seed, temporary, more)
            if isinstance(prepared, str):
                rows.append((name, "not run", prepared))
                continue
            print(f"\n==== {name}: {RUNS[name][0] or 'no variables'}, {RUNS[name][1]} threads", flush=True)
            start = time.perf_counter()
            run = subprocess.Popen(prepared[0], cwd=ROOT, env=prepared[1], stdout=subprocess.PIPE, text=True)
            last = ""
            for line in run.stdout:
                sys.stdout.write(line)
                last = line.strip() or last
            status = run.wait()
            rows.append((name, "passed" if status == 0 else f"FAILED ({status})", f"{last}"))
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    print(f"\n{processor()}, {platform.platform()}, order of seed {arguments.seed}")
    for row in rows:
        print("{:<14}{:<14}{}".format(*row))
    return 0 if all(row[1] == "passed" for row in rows) else 1


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
