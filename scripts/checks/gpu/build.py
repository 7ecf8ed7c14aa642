# SPDX-License-Identifier: MIT
"""Stage build: nvcc's module for this GPU, if none is there that serves it. Also the peers, for other stages."""

import os
import sys
import time

from . import machine
from .report import ROOT, Clock, Report, Running, verdict
from .settings import Settings


def run(report: Report, settings: Settings, clock: Clock) -> int:
    module = machine.nvccs_module()
    if module is not None:
        served = machine.backend(INTERNIMAGE_NVRTC="0")
        lacking = machine.lacks_code_for_this_gpu()
        if machine.is_compiled(served) and not lacking:
            report.write(f"`{module.name}` is there and serves this GPU: not built.")
            return 0
        report.write(f"`{module.name}` is there, but does not serve this GPU: {lacking or served}\n")
    if machine.tool("nvcc") is None and not os.environ.get("CUDA_HOME"):
        report.write("Not built: there is no nvcc. NVRTC compiles the kernels when they are first needed.")
        return 0
    if not (ROOT / "setup.py").is_file():
        report.write("Not built: there is no setup.py here.")
        return 0
    import torch

    architecture = os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*torch.cuda.get_device_capability())
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    variables = {"INTERNIMAGE_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    building = report.run(command, clock.left(), tail=15, **variables)
    if problem := verdict(building):
        report.write(f"{problem} NVRTC compiles the kernels when they are first needed.")
        return 1
    served = machine.backend(INTERNIMAGE_NVRTC="0")
    report.write(f"Built for {architecture} in {time.monotonic() - start:.0f} s: {served}.")
    return int(not machine.is_compiled(served))


def start_peers(report: Report, settings: Settings, seconds: float) -> dict[str, Running]:
    """Build the operators of the checkouts, in the background; what is built already takes some seconds."""
    command = [sys.executable, "scripts/bench/cuda_peers.py"]
    given = {name: arguments for name in ("official", "dcnv4") if (arguments := settings.peers(name))}
    return {name: report.start([*command, *arguments], seconds) for name, arguments in given.items()}


def finish_peers(report: Report, building: dict[str, Running]) -> None:
    """Wait for them, and say what was built; the benchmarks leave out the others."""
    for name, running in building.items():
        running.wait()
        said = [line for line in running.lines if not line.startswith("-")][-1:]  # without what was patched
        report.write(f"\nPeer {name}: {' '.join([*said, verdict(running)])}".rstrip())
