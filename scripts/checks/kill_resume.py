# SPDX-License-Identifier: MIT
"""Kill training with SIGKILL again and again, resume it, and compare the end with a run that was never killed.

Kills come at random times, in the middle of a checkpoint's write, before and after its rename, and while an old one is
removed. Every run must end with the same weights, averaged weights and losses, bit for bit. Augmentation, mixing, drop
path and averaging are on; the killed runs load with 0 and 2 workers in turn.

Runs of two processes (ddp, fsdp) have a parent that does what torchrun does. At random times it alone is killed, and
they must end by themselves. With --damage, the newest checkpoint is damaged after kills: the run must name it and the
one that it goes on from, and end bit for bit all the same.

    python scripts/checks/kill_resume.py --kills 200
    python scripts/checks/kill_resume.py --kills 200 --kinds file,ddp,fsdp --damage flip,zero,truncate,delete
"""

import argparse
import csv
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from internimage.config import load_config
from internimage.engine import checkpoint, integrity
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.finetune import finetune

SETTINGS = [
    "model=internimage_atto", "pretrained=false", "img_size=32", "epochs=6", "batch_size=8", "accumulate=2", "lr=0.003",
    "warmup_epochs=1", "drop_path=0.3", "mixup=0.4", "cutmix=0.5", "auto_augment=rand-m5-mstd0.5", "random_erasing=0.3",
    "ema_decay=0.9", "checkpoint_every=2", "report=false", "device=cpu", "layer_decay=0.8",
]  # fmt: skip
KINDS = {"file": 1, "ddp": 2, "fsdp": 2}  # processes
MORE = {
    "file": [],
    "ddp": ["epochs=4", "accumulate=1"],  # less, since exchanges take their time
    "fsdp": ["epochs=4", "accumulate=1", "parallel=fsdp"],
}
# what a child does to itself: the place, and whether before or after it
PLACES = ("write", "before-rename", "after-rename", "removal")
DAMAGE = ("flip", "zero", "truncate", "delete")


def write_data(folder: Path) -> None:
    """Noise of two kinds: nothing to learn, everything to reproduce."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 14), ("val", 3)):
        for label in range(2):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(20, 20, 3, generator=generator) * (100 + 155 * label)
                Image.fromarray(pixels.byte().numpy()).save(folder / split / str(label) / f"{i}.png")


# ---- kills


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, countdown: int) -> None:
    """Make this process kill itself at the given visit of a place in the writing of checkpoints."""
    left = [countdown]

    def now() -> bool:
        left[0] -= 1
        return left[0] < 0

    if place == "write":
        init, write = integrity.Summing.__init__, integrity.Summing.write

        def counting(self, file) -> None:
            init(self, file)
            self.dies = now()

        def dying(self, data) -> int:
            count = write(self, data)
            if self.dies and self.size > 10_000:
                self.flush()  # so that the part is on the disk
                die()
            return count

        integrity.Summing.__init__, integrity.Summing.write = counting, dying
    elif place == "removal":
        unlink = Path.unlink

        def patched(path, *arguments, **keywords):
            if "step-" in f"{path.parent.name}/{path.name}" and now():
                die()
            unlink(path, *arguments, **keywords)

        Path.unlink = patched
    else:
        replace = os.replace

        def patched(source, target, *arguments, **keywords):
            hit = Path(target).name.startswith("step-") and now()
            if hit and place == "before-rename":
                die()
            replace(source, target, *arguments, **keywords)
            if hit:
                die()

        os.replace = patched


@dataclass
class Child:
    """A run that was started."""

    process: int  # its id; of two processes, their parent's
    ended: int  # a pipe that is closed at this end when all its processes are gone


@dataclass
class Start:
    """How a run is started."""

    data: Path
    kind: str
    output: Path
    workers: int

    def __call__(self, place: str | None = None, countdown: int = 0, rank: int = 0) -> Child:
        """Begin or go on with a run in child processes, of which one may kill itself.

        Everything is imported already: a start takes a fraction of a second.
        """
        mine, theirs = os.pipe()
        child = os.fork()
        if child:
            os.close(theirs)
            return Child(child, mine)
        os.close(mine)
        os.setpgid(0, 0)  # its loader workers go with it
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if KINDS[self.kind] == 1:
            self._run(place, countdown)
        self._launch(place, countdown, rank)

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def _run(self, place: str | None, countdown: int) -> None:
        try:
            if place:
                arm(place, countdown)
            where = [f"data={self.data}", f"output={self.output}", f"workers={self.workers}"]
            finetune(load_config(FinetuneConfig, None, [*SETTINGS, *MORE[self.kind], *where]), progress=False)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)

    def _launch(self, place: str | None, countdown: int, rank: int) -> None:
        """As torchrun: start the processes, and end the others when one of them has failed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count, ranks, code = KINDS[self.kind], {}, 0
        for i in range(count):
            process = os.fork()
            if process == 0:
                os.environ |= {
                    "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
                }  # fmt: skip
                self._run(place if i == rank else None, countdown)
            ranks[process] = i
        while ranks:
            process, status = os.wait()
            del ranks[process]
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)


def wait(child: Child, kill_after: float | None = None, alone: bool = False) -> int:
    """Wait for a child, or kill it after some seconds, with all its processes or alone.

    Returns:
        Its exit code, negative for a signal.
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
    if alone and not select.select([child.ended], [], [], 60)[0]:
        raise RuntimeError("processes go on though their parent was killed a minute ago")
    try:
        os.killpg(child.process, signal.SIGKILL)  # workers that have not noticed yet
    except ProcessLookupError:
        pass
    select.select([child.ended], [], [], 60)
    os.close(child.ended)
    return code


# ---- damage


def damage(path: Path, how: str, draw: random.Random) -> str:
    """Spoil a checkpoint; returns what was done to which file. A folder may be deleted as a whole."""
    if how == "delete" and path.is_dir() and draw.random() < 0.3:
        shutil.rmtree(path)
        return f"delete {path.name}"
    file = draw.choice(sorted(path.iterdir())) if path.is_dir() else path
    content = file.read_bytes()
    changed = bytearray(content)
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        os.truncate(file, draw.randrange(len(content)))
    else:
        while changed == content:  # a page may be of zeros already
            start = draw.randrange(len(content))
            if how == "zero":
                start -= start % 4096
                changed[start : start + 4096] = bytes(len(changed[start : start + 4096]))
            else:
                for _ in range(draw.choice((1, 1, 3))):
                    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
    return f"{how} {path.name}" + (f"/{file.name}" if file != path else "")


@dataclass
class Damage:
    """A damaged checkpoint that the run has not met yet, and what it has to say when it does."""

    path: Path
    before: Path
    seen: int  # bytes of the log from before

    def is_named(self, log: Path) -> bool:
        said = log.read_bytes()[self.seen :].decode(errors="replace")
        passed = f"the checkpoint '{self.path}' cannot be read and is passed over: "
        return passed in said and f"the run goes on from '{self.before}'" in said


# ---- what runs come to


def outcome(output: Path) -> dict:
    """What must not depend on kills."""
    newest = checkpoint.checkpoints(output / "checkpoints")[0]
    if newest.is_dir():
        whole = output.with_suffix(".whole.pt")
        dcp_to_torch_save(newest, whole)
        state = torch.load(whole, weights_only=True)
        whole.unlink()
    else:
        state = checkpoint.load_file(newest)
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


def differences(a: dict, b: dict) -> list[str]:
    """Names of what differs."""
    found = [kind for kind in ("losses", "epochs") if a[kind] != b[kind]]
    for kind in ("weights", "raw", "average", "optimizer"):
        if a[kind].keys() != b[kind].keys():
            found.append(kind)
            continue
        found += [f"{kind} {key}" for key in a[kind] if not torch.equal(a[kind][key], b[kind][key])]
    return found


@dataclass
class Whole:
    """A run that nobody killed."""

    seconds: float
    outcome: dict = field(repr=False)

    @classmethod
    def of(cls, start: Start) -> "Whole":
        began = time.perf_counter()
        if wait(start()):
            raise RuntimeError(f"the {start.kind} run that nobody killed failed: {start.log.read_text()[-2000:]}")
        return cls(time.perf_counter() - began, outcome(start.output))


def kill_and_resume(start: Start, whole: Whole, most: int, first: int, kinds: list[str], draw: random.Random):
    """One run, killed up to `most` times, of which the first is the n-th of all.

    Returns:
        What was done to it, and what differs at its end.

    Raises:
        RuntimeError: It did not end, or did not name a damaged checkpoint.
    """
    done, pending = [], None
    while True:
        number, killed = first + len([what for what in done if not what.startswith(DAMAGE)]), None
        if number - first >= most:
            code = wait(start())
        elif number % 2:
            killed = PLACES[number // 2 % len(PLACES)]
            rank = draw.randrange(KINDS[start.kind]) if killed == "write" else 0
            code = wait(start(killed, draw.randrange(3), rank))
        else:
            seconds, alone = draw.uniform(0.0, 0.6 * whole.seconds), KINDS[start.kind] > 1 and draw.random() < 0.5
            killed = f"{seconds:.2f} s{' (parent)' if alone else ''}"
            code = wait(start(), seconds, alone)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"failed with {code} after {', '.join(done)}: {start.log.read_text()[-2000:]}")
        if pending is not None and pending.is_named(start.log):
            pending = None
        if code == 0:
            if pending is not None:
                raise RuntimeError(f"did not name '{pending.path}' after {', '.join(done)}")
            return done, differences(whole.outcome, outcome(start.output))
        done.append(killed)
        there = checkpoint.checkpoints(start.output / "checkpoints")
        if kinds and pending is None and len(there) > 1:
            how = kinds[number % len(kinds)]
            done.append(damage(there[0], how, draw))
            if there[0].exists():  # of what is gone nothing is left to name
                pending = Damage(there[0], there[1], start.log.stat().st_size)


def choices(text: str, known) -> list[str]:
    names = text.split(",") if text else []
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of all kinds of runs together")
    parser.add_argument("--seed", type=int, default=0, help="of the times, places and damage")
    parser.add_argument(
        "--kinds", type=lambda text: choices(text, KINDS), default=["file"], help=f"of {', '.join(KINDS)}, in turn"
    )
    parser.add_argument(
        "--damage", type=lambda text: choices(text, DAMAGE), default=[], help=f"of {', '.join(DAMAGE)}, after kills"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before the fork; threads of a pool do not survive it
    draw = random.Random(arguments.seed)
    failed, whole, kills, runs, damaged = False, {}, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_data(folder / "data")
        while kills < arguments.kills:
            kind = arguments.kinds[runs % len(arguments.kinds)]
            try:
                if kind not in whole:
                    whole[kind] = Whole.of(Start(folder / "data", kind, folder / f"whole-{kind}", 0))
                    steps = len(whole[kind].outcome["losses"])
                    print(f"a whole {kind} run takes {whole[kind].seconds:.1f} s, {steps} steps", flush=True)
                start = Start(folder / "data", kind, folder / f"run{runs}", 2 * (runs // len(arguments.kinds) % 2))
                most = min(7, arguments.kills - kills)
                done, found = kill_and_resume(start, whole[kind], most, kills, arguments.damage, draw)
            except RuntimeError as error:
                print(f"run {runs} ({kind}): {error}", file=sys.stderr)
                return 1
            count = len([what for what in done if what.startswith(DAMAGE)])
            kills, damaged = kills + len(done) - count, damaged + count
            print(f"run {runs} ({kind}): workers {start.workers}, {', '.join(done) or 'not killed'}: ", end="")
            print(f"DIFFERS in {', '.join(found[:5])}" if found else "the same, bit for bit", flush=True)
            failed |= bool(found)
            runs += 1
            shutil.rmtree(start.output)
        damages = f", {damaged} checkpoints damaged" if arguments.damage else ""
        print(f"{kills} kills{damages}, {runs} runs: {'NOT ' if failed else ''}all the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
