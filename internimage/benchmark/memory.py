# SPDX-License-Identifier: MIT
"""Peak memory of a model's work, in a process of its own.

What counts is by how much the process's resident memory grows at its peak, from when the model and its input are there
and an inference of one image has loaded what libraries load late, to after two calls. Linux only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .timing import BenchmarkError

if TYPE_CHECKING:
    from .models import Contender

THREADS = 1  # more of them have caches of their own, and the peak depends on when each gets to run


def peak(contender: "Contender", batch: int, training: bool) -> float:
    """The growth in MB (10^6 bytes).

    Raises:
        BenchmarkError: The system does not tell, or the process failed.
    """
    check_system()
    task = {
        "name": contender.name,
        "checkout": str(contender.checkout) if contender.checkout is not None else None,
        "img_size": contender.img_size,
        "batch": batch,
        "training": training,
    }
    root = str(Path(__file__).parents[2])  # where the package is, if it is not installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS=str(THREADS))
    command = [sys.executable, "-m", "internimage.benchmark.memory", json.dumps(task)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise BenchmarkError(f"measuring the memory of {contender.name} failed: {reason}")
    return float(result.stdout.split()[-1])


def check_system() -> None:
    """BenchmarkError where the system does not tell: to ask before an hour of measuring."""
    if not Path("/proc/self/clear_refs").exists():
        raise BenchmarkError("peak memory is measured on Linux only; leave it out with --no-memory")


def _status(key: str) -> int:
    """An entry of /proc/self/status that is in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {key}")


def _measure(task: dict) -> float:
    import ctypes
    import gc

    import torch

    from .models import Contender, inference, training_step

    torch.set_num_threads(THREADS)
    checkout = Path(task["checkout"]) if task["checkout"] else None
    contender = Contender(task["name"], checkout=checkout, img_size=task["img_size"])
    model, images = contender.build(), contender.images(task["batch"])
    inference(model, images[:1])()
    work = training_step(model.train(), images) if task["training"] else inference(model, images)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what building the model has freed is not there to be used again
    except AttributeError:
        pass
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    work()
    return (_status("VmHWM") - before) / 1e6


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
