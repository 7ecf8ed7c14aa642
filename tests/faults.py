# SPDX-License-Identifier: MIT
"""Run by torchrun from test_faults.py: things go wrong in one process of two, and what every process makes of it.

    torchrun faults.py DATA FOLDER

writes FOLDER/faults.json: for each scenario, of each process the exit status and what it printed to stderr.
"""

import contextlib
import io
import json
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from double import in_double

from internimage.cli import evaluate, main
from internimage.engine import checkpoint, trainer
from internimage.engine.checkpoint import checkpoints
from internimage.engine.run import train as train_task

DATA, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
SETTINGS = [
    "model=internimage_atto", "pretrained=false", "img_size=32", "epochs=2", "batch_size=8", "workers=0", "lr=0.003",
    "warmup_epochs=1", "drop_path=0.2", "mixup=0.4", "device=cpu", "report=false", "checkpoint_every=2",
]  # fmt: skip

dist.init_process_group("gloo")
RANK = dist.get_rank()
for verb in (train_task, evaluate.run):
    verb.__globals__["leave"] = lambda: None  # the processes stay together for all scenarios
RESULTS = {}


def train(name, *more, data=DATA):
    return main(["finetune", *SETTINGS, f"data={data}", f"output={FOLDER / name}", *more])


def scenario(name, run):
    """Run in both processes; a scenario that leaves one of them waiting ends by the test's time limit."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = run(name)
    everything = [None, None]
    dist.all_gather_object(everything, {"code": code, "err": err.getvalue()})
    RESULTS[name] = everything


@contextlib.contextmanager
def replaced(owner, attribute, value):
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


@contextlib.contextmanager
def small_files(rank, size):
    """The system refuses files over a size, in one process: what a full disk does to whoever writes."""
    if rank == RANK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def stop_at(step):
    """Both stop at a step because one of them was asked to."""
    run = trainer.Trainer.run
    return replaced(
        trainer.Trainer,
        "run",
        lambda self, stop, progress=True: run(
            self, lambda: RANK == 1 and self.progress.step + 1 >= step, progress
        ),
    )  # fmt: skip


def full_disk(rank, folder, *more, begin=True, end=True):
    """Stop at step 3, go on on a full disk, go on on an empty one; without `begin` or `end` only the rest of it."""

    def run(_):
        if begin:
            with stop_at(3):
                assert train(folder, *more) == 0
        with small_files(rank, 200_000):
            code = train(folder, *more)
        kept = [path.name for path in checkpoints(FOLDER / folder / "checkpoints")]
        partial = list((FOLDER / folder / "checkpoints").glob(".partial*"))
        dist.barrier()  # nobody goes on before everybody has looked
        if end:
            assert train(folder, *more) == 0
        return [code, kept, len(partial)]

    return run


def poisoned(rank, bad, value=float("nan")):
    place = trainer.Trainer._to_device

    def patched(self, batch, step):
        images, targets = place(self, batch, step)
        return (images * value if step in bad and rank == RANK else images), targets

    return replaced(trainer.Trainer, "_to_device", patched)


def bad_batch(name):
    with poisoned(1, {3}), small_files(1, 5_000):
        return train(name, "checkpoint_every=0")


def left_out_in_half_precision(name):
    with poisoned(1, {1, 4}):
        code = train(name, "precision=float16")
    scaler = torch.load(checkpoints(FOLDER / name / "checkpoints")[0], weights_only=True)["scaler"]
    return [code, scaler["scale"]]


def full_log(name):
    """The table of steps cannot be written from step 5 on."""
    step = trainer.TrainingLog.step

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    def patched(self, number, *arguments):
        file = self._steps
        if number == 5 and file is not None:
            self._steps = Full()
        step(self, number, *arguments)
        self._steps = file

    with replaced(trainer.TrainingLog, "step", patched):
        return train(name)


def unreadable(name):
    """Twenty images in a row: those of the second process in the first step, whatever the order."""
    folder = FOLDER / "damaged"
    if RANK == 0:
        for label in "012":
            (folder / label).mkdir(parents=True)
            for i in range(9):
                (folder / label / f"{i}.png").write_bytes(b"nothing")
    dist.barrier()
    data = folder if RANK == 1 else DATA / "train"
    return train(name, "workers=1", "eval_every=0", data=data)


def unwritable_result(name):
    """Training goes to its end, and there is no room for the model."""
    module = sys.modules["internimage.tasks.classification.task"]
    save = module.save_model

    def patched(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))  # from here on
        save(*arguments)

    with small_files(-1, 0), replaced(module, "save_model", patched):
        code = train(name, "report=true")
    there = (FOLDER / name / "model.safetensors").exists()
    dist.barrier()
    again = train(name, "report=true")
    return [code, there, again, (FOLDER / name / "model.safetensors").exists()]


def damaged_shards(name):
    """The newest sharded checkpoint has lost a part: the one before it serves, its step is saved again."""
    with stop_at(4):
        assert train(name, *LAYERED) == 0
    newest = checkpoints(FOLDER / name / "checkpoints")[0]
    dist.barrier()
    if RANK == 0:
        part = newest / "__1_0.distcp"
        part.write_bytes(part.read_bytes()[:1000])
    dist.barrier()
    again = []
    save = checkpoint.save_folder

    def watched(folder, step, *arguments):
        again.append(step)
        return save(folder, step, *arguments)

    with replaced(checkpoint, "save_folder", watched):
        code = train(name, *LAYERED)
    return [code, newest.name, again[:1]]


def label_outside(name):
    """A class map has classes that the model does not have."""
    return main(
        ["evaluate", "--model", str(FOLDER / "whole"), "--data", str(DATA / "val"), "--workers", "0", "--device", "cpu",
         "--class-map", str(FOLDER / "map.txt")]
    )  # fmt: skip


def other_folder(name):
    """An output folder that the second machine does not see."""
    with stop_at(3):
        assert train(name) == 0
    if RANK == 1:
        return train(f"{name}-elsewhere")
    return train(name)


# those of test_sigterm_to_a_launch_of_two_processes
LONG = ("epochs=20", "mixup=0", "eval_every=0", "checkpoint_every=0")
# averaging is off here, so that the sharded weights themselves are validated between epochs
LAYERED = ("parallel=fsdp", "layer_decay=0.8", "offset_lr_factor=0.1", "precision=bfloat16", "accumulate=2")

scenario("whole", train)
scenario("sharded", lambda name: train(name, "parallel=fsdp", "checkpoint_every=0"))
scenario("long", lambda name: train(name, *LONG))
# with batch norm fixed: over a part it is another function than over the batch
with in_double():
    scenario("accumulated", lambda name: train(name, "freeze=5", "accumulate=2"))
    scenario(
        "accumulated, sharded",
        lambda name: train(name, "freeze=5", "accumulate=2", "parallel=fsdp", "checkpoint_every=0"),
    )
scenario("full disk, file", full_disk(0, "full disk, file"))
# the same run: after the first process, the disk of the second is full
shards = "full disk, shards", "parallel=fsdp"
scenario("full disk, shards, first", full_disk(0, *shards, end=False))
scenario("full disk, shards, second", full_disk(1, *shards, begin=False))
scenario("bad batch", bad_batch)
scenario("left out", left_out_in_half_precision)
scenario("full log", full_log)
scenario("unreadable", unreadable)
scenario("unwritable result", unwritable_result)
scenario("label outside", label_outside)
scenario("other folder", other_folder)
scenario("layered", lambda name: train(name, *LAYERED, "checkpoint_every=0"))
scenario("damaged shards", damaged_shards)
if RANK == 0:
    (FOLDER / "faults.json").write_text(json.dumps(RESULTS))
dist.barrier()
dist.destroy_process_group()
