# SPDX-License-Identifier: MIT
"""Overhead of the training loop, its start-up time, and the throughput of the loader; on the CPU.

    python scripts/bench/loop_overhead.py --csv overhead.csv

* loop: a run of `finetune` on synthetic photographs, with its calls timed. Forward, loss, backward, gradient norm and
  clipping and the optimizer step are the work of the recipe; the rest of a step (seeds, random draws of drop path,
  copies, statistics, communication, logging, freeing gradients) is overhead, apart from the wait for the next batch.
  Overhead is CPU time of the training thread, which other processes disturb little; waiting is wall time.
* start: from the start of `python -m internimage finetune` to its first step, without loading weights.
* loader: images/s of the loader by itself, by number of workers, with the augmentation of the ImageNet recipes.
* memory format: a training step with contiguous and with channels-last images and convolutions, alternating.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

import internimage  # noqa: E402, F401
from internimage.benchmark.timing import Clock, facts, interleave  # noqa: E402
from internimage.config import load_config  # noqa: E402
from internimage.engine import trainer  # noqa: E402
from internimage.engine.rng import BatchPlan, PlanSampler  # noqa: E402
from internimage.engine.run import train  # noqa: E402
from internimage.tasks.classification.config import FinetuneConfig  # noqa: E402
from internimage.tasks.classification.task import ClassificationTask  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
AUGMENTATION = ["auto_augment=rand-m9-mstd0.5-inc1", "color_jitter=0.4", "random_erasing=0.25", "scale_min=0.08"]
WORK = ("forward", "loss", "backward", "norm and clipping", "optimizer")


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of about the dimensions and file size of ImageNet's (500x375, 60 kB)."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(3, 24, 32, generator=generator)
        image = torch.nn.functional.interpolate(coarse[None], (375, 500), mode="bicubic")[0]
        image = (image + 0.06 * torch.randn(3, 375, 500, generator=generator)).clamp(0, 1)
        path = folder / "train" / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path, quality=90)


def settings(data: Path, output: Path, *more: str) -> list[str]:
    return [
        f"data={data}", f"output={output}", "model=internimage_tiny", "pretrained=false", "img_size=224", "epochs=1",
        "batch_size=8", "warmup_epochs=0", "device=cpu", "report=false", "eval_every=0", *AUGMENTATION, *more,
    ]  # fmt: skip


class Watch:
    """Times of named calls within each step: CPU time of this thread, and wall time."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        self.now: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self.start: tuple[float, float] | None = None

    @staticmethod
    def clock() -> tuple[float, float]:
        return time.thread_time(), time.perf_counter()

    def timed(self, name: str, function):
        def call(*arguments, **keywords):
            cpu, wall = self.clock()
            try:
                return function(*arguments, **keywords)
            finally:
                now, before = self.clock(), self.now[name]
                self.now[name] = (before[0] + now[0] - cpu, before[1] + now[1] - wall)

        return call

    def next_step(self) -> None:
        """A step ends where the next one begins."""
        cpu, wall = self.clock()
        if self.start is not None:
            self.now["step"] = (cpu - self.start[0], wall - self.start[1])
            self.steps.append(dict(self.now))
        self.now.clear()
        self.start = (cpu, wall)


class TimedLoader:
    """Iterates over a loader; a step of `watch` begins with each micro-batch."""

    def __init__(self, loader: Iterable, watch: Watch) -> None:
        self.batches, self.watch = iter(loader), watch

    def __iter__(self) -> "TimedLoader":
        return self

    def __next__(self):
        self.watch.next_step()
        return self.watch.timed("wait", next)(self.batches)


class TimedTask(ClassificationTask):
    """Classification with timed loader, forward pass and loss."""

    def __init__(self, config: FinetuneConfig, watch: Watch) -> None:
        super().__init__(config)
        self.watch = watch

    def create_model(self) -> nn.Module:
        model = super().create_model()
        model.forward = self.watch.timed("forward", model.forward)
        self.loss_function.forward = self.watch.timed("loss", self.loss_function.forward)
        return model

    def train_loader(self, sampler: PlanSampler, pin_memory: bool):
        return TimedLoader(super().train_loader(sampler, pin_memory), self.watch)


def measure_loop(data: Path, folder: Path, workers: int) -> dict[str, float]:
    """Medians over the steps of a run, in seconds."""
    watch, patches = Watch(), unittest.mock.patch.object
    config = load_config(FinetuneConfig, None, settings(data, folder / f"loop{workers}", f"workers={workers}"))
    with (
        patches(torch.Tensor, "backward", watch.timed("backward", torch.Tensor.backward)),
        patches(trainer, "grad_norm", watch.timed("norm and clipping", trainer.grad_norm)),
        patches(trainer, "scale_grads", watch.timed("norm and clipping", trainer.scale_grads)),
        patches(torch.optim.AdamW, "step", watch.timed("optimizer", torch.optim.AdamW.step)),
    ):
        train(TimedTask(config, watch))
    steps = watch.steps[2:]  # the first ones warm up
    cpu = {name: statistics.median(s[name][0] for s in steps) for name in (*WORK, "step")}
    rest = statistics.median(s["step"][0] - s["wait"][0] - sum(s[name][0] for name in WORK) for s in steps)
    waits, walls = sum(s["wait"][1] for s in steps), sum(s["step"][1] for s in steps)
    return cpu | {"overhead": rest, "waiting": waits / walls, "steps": len(steps)}


FIRST_STEP = """
import sys, time
from internimage.engine import trainer
def first(self, *_):
    print("first step at", time.time(), flush=True)
    raise SystemExit
trainer.Trainer._step = first
from internimage.cli import main
main(sys.argv[1:])
"""


def measure_start(data: Path, folder: Path) -> float:
    """Seconds from the start of a process to its first step."""
    began = time.time()
    result = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, "finetune", *settings(data, folder / f"start{began}", "workers=2")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if "first step at" not in result.stdout:
        raise SystemExit(result.stderr)
    return float(result.stdout.split("first step at")[1].split()[0]) - began


def measure_loader(data: Path, workers: int, batches: int) -> float:
    """Throughput of the loader by itself, in images/s."""
    config = load_config(FinetuneConfig, None, settings(data, Path("unused"), f"workers={workers}"))
    task = ClassificationTask(config)
    task.open_data()
    task.create_model()  # for its preprocessing
    plan = BatchPlan(task.train_size, config.batch_size, 1, 0)
    sampler = PlanSampler(plan, [0], 0, batches + 2 * workers + 1)
    found = iter(task.train_loader(sampler, False))
    for _ in range(2 * workers + 1):  # batches that were prefetched while the workers started
        next(found)
    start = time.perf_counter()
    for _ in range(batches):
        next(found)
    return batches * config.batch_size / (time.perf_counter() - start)


def measure_formats(rounds: int, threads: int) -> dict[str, float]:
    """CPU time of forward and backward of InternImage-T at batch 8 in seconds, by memory format."""
    functions = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        model = timm.create_model("internimage_tiny").to(memory_format=layout).train()
        images = torch.randn(8, 3, 224, 224).contiguous(memory_format=layout)

        def step(model=model, images=images):
            model.zero_grad()
            model(images).mean().backward()

        functions[name] = step
    times = interleave(functions, rounds, Clock("cpu", threads), settle=False)
    return {name: statistics.median(seconds) for name, seconds in times.seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="steps of the timed run")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the memory formats")
    parser.add_argument("--csv", type=Path, help="append a row per figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []

    def note(name: str, value: float, unit: str, more: str = "") -> None:
        rows.append({"figure": name, "value": round(value, 4), "unit": unit})
        print(f"{name:<44} {value:>9.3f} {unit}{more}", flush=True)

    about = facts(Clock("cpu", 1))
    print(", ".join(f"{key} {value}" for key, value in about.items() if value != ""), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_photographs(folder / "data", 8 * arguments.steps)
        starts = [measure_start(folder / "data", folder) for _ in range(4)]
        note("start to first step, first", starts[0], "s")
        note("start to first step, median of the next 3", statistics.median(starts[1:]), "s")
        for workers in arguments.workers:
            loop = measure_loop(folder / "data", folder, workers)
            if workers == arguments.workers[-1]:
                for name in WORK:
                    note(f"step: {name}", loop[name], "s")
                note("step: overhead of the loop", loop["overhead"], "s")
                work = sum(loop[name] for name in WORK) + loop["overhead"]
                both = loop["overhead"] + loop["norm and clipping"]
                note("overhead, share of the step", 100 * loop["overhead"] / work, "%", "  (goal: below 2)")
                note("overhead with norm and clipping, share", 100 * both / work, "%")
            note(f"waiting for the loader, {workers} workers", 100 * loop["waiting"], "% of the step")
        for workers in arguments.workers:
            rate = measure_loader(folder / "data", workers, 4 * arguments.steps)
            note(f"loader alone, {workers} workers", rate, "images/s")
    formats = measure_formats(arguments.rounds, 1)
    for name, seconds in formats.items():
        note(f"forward and backward, {name}", seconds, "s")
    note("channels_last, time by contiguous", formats["channels_last"] / formats["contiguous"], "")
    if arguments.csv:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, ["figure", "value", "unit", *about], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(row | about for row in rows)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
