# SPDX-License-Identifier: MIT
"""Small training runs for kill_resume.py: how they are started, waited for and killed, and what their results are.

A run is started by forking a process that has everything imported, which takes a fraction of a second. Runs of two
processes have a parent that does what torchrun does.
"""

import csv
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from internimage.config import load_config
from internimage.engine import checkpoint
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.finetune import finetune

SETTINGS = [
    "model=internimage_atto", "pretrained=false", "img_size=32", "epochs=6", "batch_size=8", "accumulate=2", "lr=0.003",
    "warmup_epochs=1", "drop_path=0.3", "mixup=0.4", "cutmix=0.5", "auto_augment=rand-m5-mstd0.5", "random_erasing=0.3",
    "ema_decay=0.9", "checkpoint_every=2", "report=false", "device=cpu", "layer_decay=0.8",
]  # fmt: skip
PROCESSES = {"file": 1, "ddp": 2, "fsdp": 2}  # kind of run -> number of processes
SETTINGS_OF = {
    "file": [],
    "ddp": ["epochs=4", "accumulate=1"],  # shorter, since communication is slow
    "fsdp": ["epochs=4", "accumulate=1", "parallel=fsdp"],
}


def write_data(folder: Path) -> None:
    """Images of noise in two classes: there is nothing to learn, but everything to reproduce."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 14), ("val", 3)):
        for label in range(2):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(20, 20, 3, generator=generator) * (100 + 155 * label)
                Image.fromarray(pixels.byte().numpy()).save(folder / split / str(label) / f"{i}.png")


@dataclass
class Child:
    """The child process of a run."""

    process: int  # its id; of a run of two processes, that of their parent
    ended: int  # read end of a pipe that is closed when all processes of the run are gone


@dataclass
class Run:
    """A run, which can be started several times."""

    data: Path
    kind: str
    output: Path
    workers: int

    @property
    def processes(self) -> int:
        return PROCESSES[self.kind]

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def start(self, arm: Callable[[], None] | None = None, rank: int = 0) -> Child:
        """Start or resume the run in child processes.

        Args:
            arm: Called before training in the process of a rank, to make it fail later.
            rank: That rank.
        """
        ended, open_in_children = os.pipe()
        child = os.fork()
        if child:
            os.close(open_in_children)
            return Child(child, ended)
        os.close(ended)
        os.setpgid(0, 0)  # so that its loader workers can be killed with it
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.processes == 1:
            self._train(arm)
        self._launch(arm, rank)

    def _train(self, arm: Callable[[], None] | None) -> NoReturn:
        try:
            if arm is not None:
                arm()
            own = [f"data={self.data}", f"output={self.output}", f"workers={self.workers}"]
            finetune(load_config(FinetuneConfig, None, [*SETTINGS, *SETTINGS_OF[self.kind], *own]), progress=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _launch(self, arm: Callable[[], None] | None, rank: int) -> NoReturn:
        """Start the processes and, if one fails, kill the others, like torchrun."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running, code = set(), 0
        for i in range(self.processes):
            process = os.fork()
            if process == 0:
                os.environ |= {
                    "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(self.processes),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
                }  # fmt: skip
                self._train(arm if i == rank else None)
            running.add(process)
        while running:
            process, status = os.wait()
            running.remove(process)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in running:
                    os.kill(other, signal.SIGKILL)
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)


def wait(child: Child, kill_after: float | None = None, parent_only: bool = False) -> int:
    """Wait for a run to end.

    Args:
        child: Its child process.
        kill_after: Seconds after which to kill it.
        parent_only: Kill only the parent of the run's processes, which must then end by themselves.

    Returns:
        The exit code of the child, negative for a signal.

    Raises:
        RuntimeError: Processes of the run did not end a minute after their parent.
    """
    deadline = None if kill_after is None else time.perf_counter() + kill_after
    while True:
        done, status = os.waitpid(child.process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if deadline is not None and time.perf_counter() >= deadline:
            os.kill(child.process, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    if parent_only and not select.select([child.ended], [], [], 60)[0]:
        raise RuntimeError("processes are still running a minute after their parent was killed")
    try:
        os.killpg(child.process, signal.SIGKILL)  # processes that have not ended yet
    except ProcessLookupError:
        pass
    select.select([child.ended], [], [], 60)
    os.close(child.ended)
    return code


def outcome(output: Path) -> dict[str, Any]:
    """The results of a run that must not depend on interruptions."""
    newest = checkpoint.checkpoints(output / "checkpoints")[0]
    if newest.is_dir():
        whole = output.with_suffix(".whole.pt")
        dcp_to_torch_save(newest, whole)
        state = torch.load(whole, weights_only=True)
        whole.unlink()
    else:
        state, _ = checkpoint.read_file(newest)
    with (output / "steps.csv").open(newline="") as file:
        losses = [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in csv.DictReader(file)]
    with (output / "log.csv").open(newline="") as file:
        epochs = [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]
    return {
        "weights": load_file(output / "model.safetensors"),
        "raw": state["model"],
        "average": state["average"],
        "optimizer": {f"{k}.{n}": v for k, s in state["optimizer"]["state"].items() for n, v in s.items()},
        "losses": losses,
        "epochs": epochs,
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of results that differ."""
    found = [kind for kind in ("losses", "epochs") if a[kind] != b[kind]]
    for kind in ("weights", "raw", "average", "optimizer"):
        if a[kind].keys() != b[kind].keys():
            found.append(kind)
            continue
        found += [f"{kind} {key}" for key in a[kind] if not torch.equal(a[kind][key], b[kind][key])]
    return found
