# SPDX-License-Identifier: MIT
"""The machine: its GPUs, versions, tools, and which kernels are in use."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .report import ROOT

# where NVIDIA's installers put tools that they do not put on the PATH
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda-*/bin", "/opt/nvidia/nsight-compute/*", "/opt/nvidia/*/bin")


def tool(name: str) -> str | None:
    """The path of one of NVIDIA's tools."""
    on_path = shutil.which(name)
    if on_path is not None:
        return on_path
    folders = [folder for pattern in FOLDERS for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)]
    return next((found for folder in folders if (found := shutil.which(name, path=str(folder)))), None)


def output_of(*command: str) -> str:
    """The output of a program; empty if it is not installed or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit() -> str:
    """Of the checkout, or, in a pack, of the one that it was made from."""
    if packed := os.environ.get("INTERNIMAGE_COMMIT"):
        return packed
    return output_of("git", "describe", "--always", "--dirty", "--exclude=*").strip() or "unknown"


def facts() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return [
        ", ".join(f"{g.name} ({g.multi_processor_count} multiprocessors, {g.total_memory >> 30} GiB)" for g in gpus),
        f"driver {driver[0] if driver else 'unknown'}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"Python {platform.python_version()}, {os.cpu_count()} processors, commit {commit()}",
    ]


def backend(**variables: str) -> str:
    """What serves DCNv3 on CUDA, as a call shows: a name, and why it is not a compiled kernel if it is not."""
    code = (
        "import torch, internimage; from internimage.extension import backend\n"
        "x, offset, mask = (torch.zeros(1, 4, 4, c, device='cuda') for c in (16, 18, 9))\n"
        "torch.ops.internimage.dcnv3(x, offset, mask, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1.0, False, True)\n"
        "torch.cuda.synchronize(); b = backend('dcnv3', 'cuda')\n"
        "print(b.name, b.reason, sep='; ' if b.reason else '')"
    )
    environment = {**os.environ, **variables}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return lines[-1] if lines else f"status {result.returncode}"


def is_compiled(name: str) -> bool:
    """Whether that is a compiled kernel."""
    return name.startswith("compiled kernel")


def nvccs_module() -> Path | None:
    """The module with the kernels that nvcc has compiled, whether or not it loads."""
    return next(iter(sorted((ROOT / "internimage").glob("_C_cuda*.so"))), None)


def lacks_code_for_this_gpu() -> str:
    """What `internimage info` says of nvcc's module, if it is not for every GPU of this machine; else empty."""
    code = "import internimage; from internimage.extension import cuda_note; print(cuda_note())"
    environment = {**os.environ, "INTERNIMAGE_NVRTC": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    return result.stdout.strip() if "but not for" in result.stdout else ""
