# SPDX-License-Identifier: MIT
"""Kill training runs with SIGKILL again and again, resume them, and compare the results with uninterrupted runs.

Kills come at random times, and in the middle of writing a checkpoint, before and after its rename, and while an old one
is removed. Every run must end with the same weights, averaged weights and losses, bit for bit. Augmentation, mixing,
drop path and averaging are on; the killed runs load data with 0 and 2 workers in turn.

Of runs of two processes (ddp, fsdp), sometimes only the parent is killed, and the processes must end by themselves.
With --damage, the newest checkpoint is damaged after kills: the run must report it, resume from the one before, and
still end bit for bit the same.

    python scripts/checks/kill_resume.py --kills 200
    python scripts/checks/kill_resume.py --kills 200 --kinds file,ddp,fsdp --damage flip,zero,truncate,delete
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from training_faults import DAMAGE, PLACES, Damage, damage, kill_at
from training_runs import PROCESSES, Run, differences, outcome, wait, write_data

from internimage.engine.checkpoint import checkpoints

KILLS_PER_RUN = 7  # at most


@dataclass
class Reference:
    """An uninterrupted run."""

    seconds: float
    outcome: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> "Reference":
        began = time.perf_counter()
        if wait(run.start()):
            raise RuntimeError(f"the uninterrupted {run.kind} run failed: {run.log.read_text()[-2000:]}")
        return cls(time.perf_counter() - began, outcome(run.output))


@dataclass
class History:
    """What was done to a run."""

    events: list[str]  # kills and damage, in order
    kills: int = 0
    damaged: int = 0


def kill_and_resume(
    run: Run, reference: Reference, kills: int, first: int, damages: list[str], draw: random.Random
) -> tuple[History, list[str]]:
    """Start a run again and again until it ends.

    Args:
        run: The run.
        reference: An uninterrupted run of its kind.
        kills: How often it is killed.
        first: Number of kills of earlier runs; places and kinds of damage take turns.
        damages: Kinds of damage.
        draw: For times and places.

    Returns:
        What was done to it, and which results differ from the reference.

    Raises:
        RuntimeError: It failed, or did not report a damaged checkpoint.
    """
    history, pending = History([]), None
    while True:
        number, event = first + history.kills, None
        if history.kills >= kills:
            code = wait(run.start())
        elif number % 2:
            event = PLACES[number // 2 % len(PLACES)]
            rank = draw.randrange(run.processes) if event == "write" else 0
            code = wait(run.start(partial(kill_at, event, draw.randrange(3)), rank))
        else:
            seconds, parent_only = draw.uniform(0.0, 0.6 * reference.seconds), run.processes > 1 and draw.random() < 0.5
            event = f"{seconds:.2f} s{' (parent)' if parent_only else ''}"
            code = wait(run.start(), seconds, parent_only)
        done = ", ".join(history.events)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"failed with {code} after {done}: {run.log.read_text()[-2000:]}")
        if pending is not None and pending.is_reported(run.log):
            pending = None
        if code == 0:
            if pending is not None:
                raise RuntimeError(f"did not report '{pending.path}' after {done}")
            return history, differences(reference.outcome, outcome(run.output))
        assert event is not None
        history.events.append(event)
        history.kills += 1
        found = checkpoints(run.output / "checkpoints")
        if damages and pending is None and len(found) > 1:
            history.events.append(damage(found[0], damages[number % len(damages)], draw))
            history.damaged += 1
            if found[0].exists():  # a deleted checkpoint cannot be reported
                pending = Damage(found[0], found[1], run.log.stat().st_size)


def choices(text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",") if text else []
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="total number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of times, places and damage")
    parser.add_argument(
        "--kinds", type=lambda text: choices(text, PROCESSES), default=["file"], help=f"{', '.join(PROCESSES)}, in turn"
    )
    parser.add_argument(
        "--damage", type=lambda text: choices(text, DAMAGE), default=[], help=f"{', '.join(DAMAGE)}, after kills"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before the fork, which the threads of a pool do not survive
    draw = random.Random(arguments.seed)
    references: dict[str, Reference] = {}
    failed, kills, runs, damaged = False, 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        while kills < arguments.kills:
            kind = arguments.kinds[runs % len(arguments.kinds)]
            try:
                if kind not in references:
                    reference = references[kind] = Reference.of(Run(folder / "data", kind, folder / f"whole-{kind}", 0))
                    steps = len(reference.outcome["losses"])
                    print(f"an uninterrupted {kind} run takes {reference.seconds:.1f} s, {steps} steps", flush=True)
                run = Run(folder / "data", kind, folder / f"run{runs}", 2 * (runs // len(arguments.kinds) % 2))
                most = min(KILLS_PER_RUN, arguments.kills - kills)
                history, found = kill_and_resume(run, references[kind], most, kills, arguments.damage, draw)
            except RuntimeError as error:
                print(f"run {runs} ({kind}): {error}", file=sys.stderr)
                return 1
            kills, damaged = kills + history.kills, damaged + history.damaged
            events = ", ".join(history.events) or "not killed"
            print(f"run {runs} ({kind}): workers {run.workers}, {events}: ", end="")
            print(f"DIFFERS in {', '.join(found[:5])}" if found else "the same, bit for bit", flush=True)
            failed |= bool(found)
            runs += 1
            shutil.rmtree(run.output)
        damages = f", {damaged} checkpoints damaged" if arguments.damage else ""
        print(f"{kills} kills{damages}, {runs} runs: {'NOT ' if failed else ''}all the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
