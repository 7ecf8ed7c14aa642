# SPDX-License-Identifier: MIT
"""Checkpoints of a run: written whole or not at all, the last two kept.

A checkpoint is a file, or with sharded weights a folder with a part from every process. It appears under its name by a
rename, after everything in it has reached the disk: whatever instant a run is killed at, the newest name is whole. When
a run goes on, every byte is checked, and all processes take up the same one.
"""

import errno
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..atomic import PARTIAL, sync_folder
from ..config import ConfigError
from ..errors import CheckpointError, UserError
from ..files import WriteError
from . import integrity
from .integrity import DamagedError
from .world import World

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})(?:\.pt)?")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PART = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|state\.pt")  # of a checkpoint that is a folder
_ZIP = b"PK\3\4"  # a checkpoint begins so
KEEP = 2


class CheckpointWriteError(WriteError):
    """A checkpoint could not be written; the ones before it are as they were."""


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name has."""
    return int(_NAME.fullmatch(path.name)[1])


def save_file(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint as one file.

    Args:
        folder: Of the run's checkpoints; is made.
        step: Steps done; part of the name.
        state: Tensors, numbers, strings and containers of them.

    Raises:
        CheckpointWriteError: The disk is full, or the like.
    """
    try:
        _make(folder)
        partial, final = folder / f"{PARTIAL}{step:09d}", folder / f"step-{step:09d}.pt"
        integrity.save(partial, state)
        _publish(partial, final)
    except (OSError, RuntimeError) as error:
        raise _failed(folder, step, error) from error
    except BaseException:
        _clean(folder)
        raise
    _remove_old(folder, step)
    return final


def save_folder(folder: Path, step: int, write: Callable[[Path], None], world: World) -> Path:
    """Write a checkpoint as a folder that all processes fill; what goes wrong in one is raised in all.

    Args:
        folder, step: As in `save_file`.
        write: Fills the folder that it is given; is called in every process, which may talk to each other in it, as
            long as all of them come back from it or raise.
        world: The processes.

    Raises:
        CheckpointWriteError: The disk is full, or the like.
    """
    partial, final = folder / f"{PARTIAL}{step:09d}", folder / f"step-{step:09d}"

    def prepare() -> None:
        if world.first:
            _make(folder)
            partial.mkdir()

    def finish() -> None:
        if world.first:
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(partial)
            _publish(partial, final)

    for work in (prepare, lambda: write(partial), finish):
        failure = None
        try:
            work()
        except (OSError, RuntimeError) as error:
            failure = error
        if any(world.gather(failure is not None)):  # each has its own, or none: nobody cleans up before all are here
            problem = None if failure is None else _failed(folder, step, failure, clean=world.first)
            if world.first and failure is None:
                _clean(folder)
            world.raise_any(problem)
    if world.first:
        _remove_old(folder, step)
    return final


def load_file(path: Path) -> dict[str, Any]:
    """As `read_file`, without the checksum."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Any], int]:
    """What `save_file` was given, on the CPU, and its checksum. Runs no code from the file.

    Raises:
        DamagedError: It is no such file, or not all of it. torch's own reasons are for those who make such files, and
            one of them advises to run the code in it.
        OSError: It cannot be read.
    """
    file, checksum = integrity.open_checked(path)
    with file:
        if file.read(len(_ZIP)) != _ZIP:  # torch would take it for one of its older formats, and unpack a tar
            raise DamagedError("it is no checkpoint")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd bytes, which are an error here
                state = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # there is no end to how reading damaged bytes can fail
            _logger.debug("reading '%s'", path, exc_info=error)
            raise DamagedError("it is no checkpoint, or one that was written with code in it") from error
    if not isinstance(state, dict):
        raise DamagedError(f"it holds {type(state).__name__} instead of a run's state")
    return state, checksum


def newest(
    folder: Path, world: World, read: Callable[[Path], tuple[Any, int]], take_up: Callable[[Any], None]
) -> Path | None:
    """Take up the newest checkpoint that all processes can read; to be called in all at once.

    Only a disk that lost what it had confirmed makes the newest unreadable; the one before it then serves, in all
    processes, and is named.

    Args:
        folder: Of the run's checkpoints.
        world: The processes.
        read: Reads a checkpoint, changes nothing, and talks to no other process. Returns what is in it and a checksum
            of it, by which the processes know that they have read the same.
        take_up: Is given what was read, in all processes at once, which may talk to each other in it.

    Returns:
        The checkpoint; None where there is none.

    Raises:
        UserError: `read` says that the checkpoint does not go with the settings, none of them can be read, or the
            processes do not find the same ones; in all processes. `take_up` may have stopped half way then, and what it
            left is no start for a run.
    """
    with world.raise_on_all_ranks():
        names = [path.name for path in checkpoints(folder)]
    lists = world.gather(names)
    everywhere = [name for name in names if all(name in others for others in lists)]
    if not everywhere and any(lists):
        world.raise_any(_different(folder))
    passed = sorted({name for others in lists for name in others} - set(everywhere))
    for name in passed:
        _pass_over(folder / name, "not all processes find it", world)
    for name in everywhere:
        path = folder / name
        found, reason = _attempt(lambda path=path: read(path), world)
        if reason is None:
            content, checksum = found
            if len(set(world.gather(checksum))) > 1:
                world.raise_any(_different(folder))
            _, reason = _attempt(lambda content=content: take_up(content), world)
        if reason is None:
            if passed and world.first:
                _logger.warning("the run goes on from '%s'", path)
            return path
        _pass_over(path, reason, world)
        passed.append(name)
        found = content = None  # before the next is read, which may be as large
    if passed:
        world.raise_any(
            CheckpointError(f"none of the checkpoints in '{folder}' can be read; resume=false begins the run anew")
        )
    return None


def _attempt(work: Callable[[], Any], world: World) -> tuple[Any, str | None]:
    """What some work returned in this process, and why it failed in one of all, or None."""
    result = problem = reason = None
    try:
        result = work()
    except UserError as error:  # it can be read, and was written for another kind of run: not to be trained over
        problem = error
    except (OSError, DamagedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    world.raise_any(problem)
    return result, next((reason for reason in world.gather(reason) if reason is not None), None)


def _pass_over(path: Path, reason: str, world: World) -> None:
    if world.first:
        _logger.warning("the checkpoint '%s' cannot be read and is passed over: %s", path, reason)


def _different(folder: Path) -> ConfigError:
    return ConfigError(
        f"the processes find different checkpoints in '{folder}': 'output' must be one folder that all of them see"
    )


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(f"{PARTIAL}*") if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def recover(folder: Path, found: Path | None) -> None:
    """Finish what a killed run had left to do, once a checkpoint of it is taken up.

    Args:
        folder: Of the run's checkpoints.
        found: The one that was taken up. If that is not the newest, older ones may be all that is good, and stay.
    """
    remove_partial(folder)
    if found is not None and found == checkpoints(folder)[0]:
        _remove_old(folder, step_of(found))


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)


def _clean(folder: Path) -> None:
    """Give a full disk its space back."""
    try:
        remove_partial(folder)
    except OSError:
        pass


def _failed(folder: Path, step: int, error: BaseException, clean: bool = True) -> CheckpointWriteError:
    if clean:
        _clean(folder)
    kept = [path for path in checkpoints(folder) if step_of(path) < step]  # others were passed over
    good = f"the last good one is '{kept[0]}'" if kept else "there is none before it"
    # torch's writer does not always say what it met, and then it is a full disk
    mend = "Make room" if getattr(error, "errno", None) in (None, *_FULL) else "Mend that"
    return CheckpointWriteError(
        f"the checkpoint of step {step} could not be written ({str(error).splitlines()[0]}); {good}. {mend} and run "
        f"the same command again to go on from there"
    )


def _publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name. What has its step already was passed over when the run went on, and goes."""
    name = f"step-{step_of(final):09d}"
    for path in (final.with_name(name), final.with_name(f"{name}.pt")):
        if path.is_dir() or (path != final and os.path.lexists(path)):  # a file is replaced by a file all the same
            _remove(path)
    os.replace(partial, final)
    sync_folder(final.parent)


def _remove_old(folder: Path, step: int) -> None:
    """Of what is not newer than a step, the last ones stay; newer ones were passed over, or the run would be there."""
    found = checkpoints(folder)
    kept = [path for path in found if step_of(path) <= step][:KEEP]
    for path in found:
        if path in kept:
            continue
        try:
            _remove(path)
        except OSError as error:  # the new one is there, and that is what counts
            _logger.warning("the old checkpoint '%s' cannot be removed: %s", path, error)


def remove_all(folder: Path) -> None:
    """Remove the checkpoints of a run, and their folder if nothing else is in it."""
    for path in reversed(checkpoints(folder)):
        _remove(path)
    remove_partial(folder)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing is left; others stay."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    # the name goes first: a half removed folder must not look like a checkpoint
    others = any(not _PART.fullmatch(file.name) for file in path.iterdir())
    base = f"{'not-of-' if others else PARTIAL}{path.name}"
    gone, number = path.with_name(base), 1
    while os.path.lexists(gone):
        number += 1
        gone = path.with_name(f"{base}-{number}")
    os.replace(path, gone)
    for file in list(gone.iterdir()):
        if _PART.fullmatch(file.name):
            file.unlink()
    remove_if_empty(gone)
