# SPDX-License-Identifier: MIT
"""Faults for kill_resume.py: processes that kill themselves while they write a checkpoint, and damaged checkpoints."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internimage.engine import integrity

# where a process kills itself: in a write, before or after a checkpoint is renamed, or when an old one is removed
PLACES = ("write", "before-rename", "after-rename", "removal")
DAMAGE = ("flip", "zero", "truncate", "delete")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place: str, visits: int) -> None:
    """Patch this process so that it kills itself at a place of `PLACES`, after it has passed it some times."""
    left = visits

    def is_due() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    {"write": _kill_in_write, "removal": _kill_at_removal}.get(place, _kill_at_rename)(place, is_due)


def _kill_in_write(place: str, is_due: Callable[[], bool]) -> None:
    init, write = integrity.ChecksumWriter.__init__, integrity.ChecksumWriter.write

    def counting(self, file) -> None:
        init(self, file)
        self.dies = is_due()

    def dying(self, data) -> int:
        count = write(self, data)
        if self.dies and self.size > 10_000:
            self.flush()  # so that a part of the file is on disk
            die()
        return count

    integrity.ChecksumWriter.__init__, integrity.ChecksumWriter.write = counting, dying


def _kill_at_removal(place: str, is_due: Callable[[], bool]) -> None:
    unlink = Path.unlink

    def patched(path, *arguments, **keywords):
        if "step-" in f"{path.parent.name}/{path.name}" and is_due():
            die()
        unlink(path, *arguments, **keywords)

    Path.unlink = patched


def _kill_at_rename(place: str, is_due: Callable[[], bool]) -> None:
    replace = os.replace

    def patched(source, target, *arguments, **keywords):
        hit = Path(target).name.startswith("step-") and is_due()
        if hit and place == "before-rename":
            die()
        replace(source, target, *arguments, **keywords)
        if hit:
            die()

    os.replace = patched


def damage(path: Path, how: str, draw: random.Random) -> str:
    """Damage a checkpoint in one of the ways of `DAMAGE`; returns what was done to which file.

    Of a checkpoint that is a folder, one file is damaged, or the folder deleted.
    """
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
        while changed == content:  # a page may already be zero
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
    """A damaged checkpoint that the run has not loaded yet, and what it must print when it tries to."""

    path: Path
    before: Path  # the checkpoint from which the run must resume instead
    seen: int  # bytes of the log that were written before the damage

    def is_reported(self, log: Path) -> bool:
        said = log.read_bytes()[self.seen :].decode(errors="replace")
        passed = f"the checkpoint '{self.path}' cannot be read and is skipped: "
        return passed in said and f"the run resumes from '{self.before}'" in said
