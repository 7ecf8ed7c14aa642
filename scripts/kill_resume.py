# SPDX-License-Identifier: MIT
"""Kill training with SIGKILL again and again, resume it, and compare the end with a run that was never killed.

Kills come at random times, in the middle of a checkpoint's write, before and after its rename, and while an old one is
removed. Every run must end with the same weights, averaged weights and losses, bit for bit. Augmentation, mixing, drop
path and averaging are on; the killed runs load with 0 and 2 workers in turn.

    python scripts/kill_resume.py --kills 200
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from internimage.config import load_config
from internimage.engine import checkpoint, finetune
from internimage.settings import FinetuneConfig

SETTINGS = [
    "model=internimage_atto", "pretrained=false", "img_size=32", "epochs=6", "batch_size=8", "accumulate=2", "lr=0.003",
    "warmup_epochs=1", "drop_path=0.3", "mixup=0.4", "cutmix=0.5", "auto_augment=rand-m5-mstd0.5", "random_erasing=0.3",
    "ema_decay=0.9", "checkpoint_every=2", "report=false", "device=cpu", "layer_decay=0.8",
]  # fmt: skip
# what a child does to itself: the place, and whether before or after it
PLACES = ("write", "before-rename", "after-rename", "removal")


def write_data(folder: Path) -> None:
    """Noise of two kinds: nothing to learn, everything to reproduce."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 14), ("val", 3)):
        for label in range(2):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(20, 20, 3, generator=generator) * (100 + 155 * label)
                Image.fromarray(pixels.byte().numpy()).save(folder / split / str(label) / f"{i}.png")


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, countdown: int) -> None:
    """Make this process kill itself at the given visit of a place in the writing of checkpoints."""
    left = [countdown]

    def now() -> bool:
        left[0] -= 1
        return left[0] < 0

    if place == "write":
        save = checkpoint.torch.save

        class Dying:
            """A file that dies half way; flushed, so that the half is on the disk."""

            def __init__(self, file) -> None:
                self.file, self.bytes = file, 0

            def write(self, data) -> int:
                self.bytes += len(data)
                if self.bytes > 1_000_000:
                    self.file.flush()
                    die()
                return self.file.write(data)

            def flush(self) -> None:
                self.file.flush()

        checkpoint.torch.save = lambda state, file: save(state, Dying(file) if now() else file)
    elif place == "removal":
        unlink = Path.unlink

        def patched(path, *arguments, **keywords):
            if path.name.startswith("step-") and now():
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


def start(data: Path, output: Path, workers: int, place: str | None = None, countdown: int = 0) -> int:
    """Begin or go on with a run in a child process; returns its id."""
    child = os.fork()  # everything is imported already: a start takes a fraction of a second
    if child:
        return child
    try:
        os.setpgid(0, 0)  # its loader workers go with it
        if place:
            arm(place, countdown)
        config = load_config(
            FinetuneConfig, None, [*SETTINGS, f"data={data}", f"output={output}", f"workers={workers}"]
        )
        finetune(config, progress=False)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def wait(child: int, kill_after: float | None = None) -> int:
    """Wait for a child, or kill it after some seconds; returns its exit code, negative for a signal."""
    deadline = None if kill_after is None else time.perf_counter() + kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if deadline is not None and time.perf_counter() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    try:
        os.killpg(child, signal.SIGKILL)  # workers that have not noticed yet
    except ProcessLookupError:
        pass
    return code


def outcome(output: Path) -> dict:
    """What must not depend on kills."""
    newest = checkpoint.load_file(checkpoint.checkpoints(output / "checkpoints")[0])
    with (output / "steps.csv").open(newline="") as file:
        losses = [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in csv.DictReader(file)]
    with (output / "log.csv").open(newline="") as file:
        epochs = [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]
    return {
        "weights": load_file(output / "model.safetensors"),
        "raw": newest["model"],
        "optimizer": {f"{k}.{n}": v for k, s in newest["optimizer"]["state"].items() for n, v in s.items()},
        "losses": losses,
        "epochs": epochs,
    }


def differences(a: dict, b: dict) -> list[str]:
    """Names of what differs."""
    found = [kind for kind in ("losses", "epochs") if a[kind] != b[kind]]
    for kind in ("weights", "raw", "optimizer"):
        if a[kind].keys() != b[kind].keys():
            found.append(kind)
            continue
        found += [f"{kind} {key}" for key in a[kind] if not torch.equal(a[kind][key], b[kind][key])]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the times and places")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before the fork; threads of a pool do not survive it
    draw = random.Random(arguments.seed)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_data(folder / "data")
        began = time.perf_counter()
        if wait(start(folder / "data", folder / "whole", workers=0)):
            print("the run that nobody killed failed", file=sys.stderr)
            return 1
        whole = time.perf_counter() - began
        expected = outcome(folder / "whole")
        print(f"a whole run takes {whole:.1f} s, {len(expected['losses'])} steps", flush=True)
        kills = runs = 0
        while kills < arguments.kills:
            output, workers, here = folder / f"run{runs}", 2 * (runs % 2), []
            while True:
                if kills >= arguments.kills or len(here) >= 7:
                    code = wait(start(folder / "data", output, workers))
                elif kills % 2:
                    place = PLACES[kills // 2 % len(PLACES)]
                    code = wait(start(folder / "data", output, workers, place, draw.randrange(3)))
                    here += [place] if code == -signal.SIGKILL else []
                else:
                    seconds = draw.uniform(0.0, 0.6 * whole)
                    code = wait(start(folder / "data", output, workers), seconds)
                    here += [f"{seconds:.2f} s"] if code == -signal.SIGKILL else []
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    print(f"run {runs} failed with {code} after kills at {here}", file=sys.stderr)
                    return 1
                kills += 1
            found = differences(expected, outcome(output))
            print(f"run {runs}: workers {workers}, killed at {', '.join(here) or 'nothing'}: ", end="")
            print(f"DIFFERS in {', '.join(found[:5])}" if found else "the same, bit for bit", flush=True)
            failed |= bool(found)
            runs += 1
        print(f"{kills} kills, {runs} runs: {'NOT ' if failed else ''}all the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
