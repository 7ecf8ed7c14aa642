# SPDX-License-Identifier: MIT
"""Small training runs on noise, in this process and under torchrun, for the tests of training."""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launched import launch
from PIL import Image
from safetensors.torch import load_file

import internimage
from internimage.engine import checkpoint, trainer
from internimage.engine.run import Preempted
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.finetune import finetune

ROOT = Path(internimage.__file__).parent.parent


def write_noise(folder: Path, **splits: tuple[int, ...]) -> Path:
    """Images of noise, each class of another brightness: folder/SPLIT/CLASS/N.png, with the given counts per class."""
    generator = torch.Generator().manual_seed(0)
    for split, counts in splits.items():
        for label, count in enumerate(counts):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(20, 24, 3, generator=generator) * (60 + 60 * label)
                Image.fromarray(pixels.byte().numpy()).save(folder / split / str(label) / f"{i}.png")
    return folder


def torchrun_command(processes: int, *arguments) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*command, *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script, or `-m` and a module, in several processes like torchrun."""
    result = launch(processes, list(map(str, arguments)), environment(), timeout=1000)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def steps(run) -> list[dict[str, str]]:
    with (Path(run) / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run) -> list[float]:
    return [float(row["loss"]) for row in steps(run)]


def epochs(run) -> list[dict[str, str]]:
    """The table of epochs, without the columns that depend on time."""
    with (Path(run) / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def same_weights(a, b) -> bool:
    a, b = load_file(Path(a) / "model.safetensors"), load_file(Path(b) / "model.safetensors")
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def settings(data, output, **more):
    base = dict(
        data=str(data), output=str(output), model="internimage_atto", pretrained=False, img_size=32, epochs=3,
        batch_size=8, workers=0, lr=0.003, warmup_epochs=0 if more.get("epochs") == 1 else 1, drop_path=0.2,
        eval_every=0, device="cpu", report=False,
    )  # fmt: skip
    return FinetuneConfig(**(base | more))


@contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Context in which runs stop at a step, as if SIGTERM had come in it."""
    run = trainer.Trainer.run

    def patched(self, stop, progress=True):
        return run(self, lambda: self.progress.step + 1 >= step, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", patched)
        yield


def stop_at(config, step):
    """Run to a step, as if SIGTERM had come in it."""
    with stopping_at(step), pytest.raises(Preempted):
        finetune(config, progress=False)


def wait_for_checkpoint(run, process, more_than=0):
    while True:
        found = checkpoint.checkpoints(run / "checkpoints")
        if found and int(re.search(r"\d+", found[0].name)[0]) > more_than:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def listing(folder: Path) -> list[str]:
    """The paths of everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def arguments(config) -> list[str]:
    """The command line of a run."""
    return ["finetune", *(f"{k}={v}" for k, v in vars(config).items() if v is not None)]
