# SPDX-License-Identifier: MIT
"""Peak memory of inference or of a training step, in a separate process.

Measures how far the peak of two calls exceeds the resident memory before them, when the model and its input exist and
inference of one image has made the libraries load what they load lazily. So the model's weights do not count, but the
packed copies that inference of our models keeps of most of them do (see `layers.packing`): those of that one image are
dropped, and the two calls make new ones. A training step has none. Linux only.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..layers.packing import set_weight_packing
from .contender import Contender, inference, training_step
from .timing import BenchmarkError

THREADS = 1  # each thread has its own caches, so that with several the peak depends on scheduling


def peak(contender: Contender, batch: int, training: bool) -> float:
    """The growth in MB (10^6 bytes).

    Raises:
        BenchmarkError: The system is not Linux, or the process failed.
    """
    check_system()
    task = {
        "model": contender.model,
        "checkout": str(contender.checkout) if contender.checkout is not None else None,
        "img_size": contender.img_size,
        "packed": contender.packed,
        "on_torchvision": contender.on_torchvision,
        "batch": batch,
        "training": training,
    }
    root = str(Path(__file__).parents[2])  # the package may not be installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS=str(THREADS))
    command = [sys.executable, "-m", "internimage.benchmark.memory", json.dumps(task)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise BenchmarkError(f"measuring the memory of {contender.who} failed: {reason}")
    return float(result.stdout.split()[-1])


def check_system() -> None:
    """Check that peak memory can be measured on this system, before other measurements are made.

    Raises:
        BenchmarkError: It cannot.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise BenchmarkError("peak memory can be measured on Linux only; skip it with --no-memory")


def _status(key: str) -> int:
    """An entry of /proc/self/status, converted from kB to bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {key}")


def _measure(task: dict[str, Any]) -> float:
    torch.set_num_threads(THREADS)
    checkout = Path(task["checkout"]) if task["checkout"] else None
    given = {key: task[key] for key in ("img_size", "packed", "on_torchvision")}
    contender = Contender(task["model"], checkout=checkout, **given)
    model, images = contender.build(), contender.images(task["batch"])
    inference(model, images[:1])()
    set_weight_packing(model, contender.packed)  # drops what that has packed
    work = training_step(model.train(), images) if task["training"] else inference(model, images)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return memory that building the model has freed, which the calls could reuse
    except AttributeError:
        pass
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    work()
    return (_status("VmHWM") - before) / 1e6


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
