# SPDX-License-Identifier: MIT
"""Checkpoints of a run: complete or absent, the last two are kept.

A checkpoint is a file, or with sharded weights a folder with shards of every process. It gets its name by a rename,
after all of it has reached the disk, so that whenever a run is killed, the newest checkpoint is complete. When a run
resumes, every byte is checked, and all processes restore the same checkpoint.
"""

import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..atomic import PARTIAL, sync_folder
from ..config import ConfigError
from ..errors import CheckpointError, UserError, is_disk_full
from ..files import WriteError
from . import integrity
from .integrity import DamagedError
from .world import World

T = TypeVar("T")
R = TypeVar("R")

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})(?:\.pt)?")
_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|state\.pt")  # in a checkpoint that is a folder
_ZIP = b"PK\3\4"  # the first bytes of a checkpoint
KEEP = 2


class CheckpointWriteError(WriteError):
    """A checkpoint could not be written; earlier ones are unchanged."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"'{path}' is not the name of a checkpoint")
    return int(match[1])


def save_file(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint as one file.

    Args:
        folder: Of the run's checkpoints; is created.
        step: Steps done; part of the name.
        state: Tensors, numbers, strings and containers of them.

    Raises:
        CheckpointWriteError: The disk is full, or another error of the file system.
    """
    try:
        _prepare(folder)
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
    """Write a checkpoint as a folder that all processes write to; an error in one process is raised in all.

    Args:
        folder, step: As in `save_file`.
        write: Writes to the folder that it is given. Is called in every process and may use collectives, as long as it
            returns or raises in all processes.
        world: The processes.

    Raises:
        CheckpointWriteError: The disk is full, or another error of the file system.
    """
    partial, final = folder / f"{PARTIAL}{step:09d}", folder / f"step-{step:09d}"

    def prepare() -> None:
        if world.first:
            _prepare(folder)
            partial.mkdir()

    def finish() -> None:
        if world.first:
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(partial)
            _publish(partial, final)

    for work in (prepare, lambda: write(partial), finish):
        failure: OSError | RuntimeError | None = None
        try:
            work()
        except (OSError, RuntimeError) as error:
            failure = error
        if any(world.gather(failure is not None)):  # no process cleans up before all have stopped writing
            problem = None if failure is None else _failed(folder, step, failure, clean=world.first)
            if world.first and failure is None:
                _clean(folder)
            world.raise_any(problem)
    if world.first:
        _remove_old(folder, step)
    return final


def read_file(path: Path) -> tuple[dict[str, Any], int]:
    """Read a checkpoint of `save_file` without running code from it.

    Returns:
        The state, on the CPU, and the file's checksum.

    Raises:
        DamagedError: It is not such a file, or is damaged. torch's own message is not passed on: it is for authors of
            such files, and may advise to run the code in it.
        OSError: It cannot be read.
    """
    file, checksum = integrity.open_checked(path)
    with file:
        if file.read(len(_ZIP)) != _ZIP:  # torch would take it for one of its older formats, and unpack a tar
            raise DamagedError("it is not a checkpoint")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about unexpected bytes, which are an error here
                state = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # any: reading damaged bytes can fail in many ways
            _logger.debug("reading '%s'", path, exc_info=error)
            raise DamagedError("it is not a checkpoint, or contains code") from error
    if not isinstance(state, dict):
        raise DamagedError(f"it contains {type(state).__name__} instead of a run's state")
    return state, checksum


def newest(
    folder: Path, world: World, read: Callable[[Path], tuple[T, int]], restore: Callable[[T], None]
) -> Path | None:
    """Restore the newest checkpoint that all processes can read; to be called in all processes at once.

    The newest checkpoint is unreadable only if the disk lost data after a sync; then it is skipped with a warning, and
    all processes restore the one before it.

    Args:
        folder: Of the run's checkpoints.
        world: The processes.
        read: Reads a checkpoint. Changes nothing and uses no collectives. Returns the content and its checksum, by
            which the processes know that they have read the same.
        restore: Restores the content. Is called in all processes at once and may use collectives.

    Returns:
        The checkpoint; None if there is none.

    Raises:
        UserError: `read` finds that the checkpoint does not fit the settings, no checkpoint can be read, or the
            processes find different ones; in all processes. `restore` may have been interrupted then, so that training
            must not continue from the state that it left.
    """
    with world.raise_on_all_ranks():
        names = [path.name for path in checkpoints(folder)]
    lists = world.gather(names)
    common = [name for name in names if all(name in others for others in lists)]
    if not common and any(lists):
        world.raise_any(_different(folder))
    skipped = sorted({name for others in lists for name in others} - set(common))
    for name in skipped:
        _warn_skipped(folder / name, "not all processes find it", world)
    for name in common:
        path = folder / name
        reason = _restore(path, world, read, restore)
        if reason is None:
            if skipped and world.first:
                _logger.warning("the run resumes from '%s'", path)
            return path
        _warn_skipped(path, reason, world)
        skipped.append(name)
    if skipped:
        world.raise_any(CheckpointError(f"none of the checkpoints in '{folder}' can be read; resume=false starts over"))
    return None


def _restore(
    path: Path, world: World, read: Callable[[Path], tuple[T, int]], restore: Callable[[T], None]
) -> str | None:
    """Restore one checkpoint; returns why it cannot be read, or None. Its content is freed before the next is read."""
    found, reason = _attempt(read, path, world)
    if found is None or reason is not None:
        return reason
    content, checksum = found
    if len(set(world.gather(checksum))) > 1:
        world.raise_any(_different(path.parent))
    _, reason = _attempt(restore, content, world)
    return reason


def _attempt(work: Callable[[T], R], argument: T, world: World) -> tuple[R | None, str | None]:
    """What a function returned in this process, and why it failed in any process, or None."""
    result: R | None = None
    problem: UserError | None = None
    reason: str | None = None
    try:
        result = work(argument)
    except UserError as error:  # it is readable, but of another kind of run, which must not be continued
        problem = error
    except (OSError, DamagedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    world.raise_any(problem)
    return result, next((reason for reason in world.gather(reason) if reason is not None), None)


def _warn_skipped(path: Path, reason: str, world: World) -> None:
    if world.first:
        _logger.warning("the checkpoint '%s' cannot be read and is skipped: %s", path, reason)


def _different(folder: Path) -> ConfigError:
    return ConfigError(
        f"the processes find different checkpoints in '{folder}': 'output' must be one folder that all of them see"
    )


def remove_partial(folder: Path) -> None:
    """Remove incomplete checkpoints of killed processes."""
    for path in folder.glob(f"{PARTIAL}*") if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def recover(folder: Path, found: Path | None) -> None:
    """Do what a killed run has not done: remove incomplete and old checkpoints.

    Args:
        folder: Of the run's checkpoints.
        found: The one that was restored, or None. If it is not the newest, nothing old is removed: only older ones may
            be readable.
    """
    remove_partial(folder)
    if found is not None and found == checkpoints(folder)[0]:
        _remove_old(folder, step_of(found))


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)


def _clean(folder: Path) -> None:
    """Free the space that an incomplete checkpoint takes, as far as possible."""
    try:
        remove_partial(folder)
    except OSError:
        pass


def _failed(folder: Path, step: int, error: BaseException, clean: bool = True) -> CheckpointWriteError:
    if clean:
        _clean(folder)
    kept = [path for path in checkpoints(folder) if step_of(path) < step]  # newer ones were skipped
    good = f"the last good one is '{kept[0]}'" if kept else "there is no earlier one"
    then = "resume from it" if kept else "start over"
    # torch's writer does not always pass on the cause, which then is a full disk
    full = is_disk_full(error) or getattr(error, "errno", None) is None
    return CheckpointWriteError(
        f"the checkpoint of step {step} could not be written ({str(error).splitlines()[0]}); {good}. "
        f"{'Make room' if full else 'Fix this'} and run the same command again to {then}"
    )


def _publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name. An existing one of the same step was skipped on resume, and is replaced."""
    name = f"step-{step_of(final):09d}"
    for path in (final.with_name(name), final.with_name(f"{name}.pt")):
        if path.is_dir() or (path != final and os.path.lexists(path)):  # os.replace replaces a file by a file
            _remove(path)
    os.replace(partial, final)
    sync_folder(final.parent)


def _remove_old(folder: Path, step: int) -> None:
    """Keep the last checkpoints up to a step; newer ones were skipped on resume, and are removed."""
    found = checkpoints(folder)
    kept = [path for path in found if step_of(path) <= step][:KEEP]
    for path in found:
        if path in kept:
            continue
        try:
            _remove(path)
        except OSError as error:  # which does not affect the new one
            _logger.warning("the old checkpoint '%s' cannot be removed: %s", path, error)


def remove_all(folder: Path) -> None:
    """Remove the checkpoints of a run, and their folder unless it contains something else."""
    for path in reversed(checkpoints(folder)):
        _remove(path)
    remove_partial(folder)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    # it is renamed first: a partly removed folder must not look like a checkpoint
    others = any(not _FILE.fullmatch(file.name) for file in path.iterdir())
    base = f"{'not-of-' if others else PARTIAL}{path.name}"
    gone, number = path.with_name(base), 1
    while os.path.lexists(gone):
        number += 1
        gone = path.with_name(f"{base}-{number}")
    os.replace(path, gone)
    for file in list(gone.iterdir()):
        if _FILE.fullmatch(file.name):
            file.unlink()
    remove_if_empty(gone)
