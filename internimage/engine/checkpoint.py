# SPDX-License-Identifier: MIT
"""Checkpoints of a run: written whole or not at all, the last two kept.

A checkpoint is a file, or with sharded weights a folder with a part from every process. It appears under its name by a
rename, after everything in it has reached the disk: whatever instant a run is killed at, the newest name is whole.
"""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UserError
from ..files import WriteError, save_tensors
from .distributed import World

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})(?:\.pt)?")
_PARTIAL = ".partial-"
KEEP = 2


class CheckpointWriteError(WriteError):
    """A checkpoint could not be written; the ones before it are as they were."""


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


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
        partial, final = folder / f"{_PARTIAL}{step:09d}", folder / f"step-{step:09d}.pt"
        save_tensors(partial, state)
        os.replace(partial, final)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        raise _failed(folder, step, error) from error
    _remove_old(folder)
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
    partial, final = folder / f"{_PARTIAL}{step:09d}", folder / f"step-{step:09d}"

    def prepare() -> None:
        if world.first:
            _make(folder)
            partial.mkdir()

    def finish() -> None:
        if world.first:
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            _sync_folder(partial)
            os.replace(partial, final)
            _sync_folder(folder)

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
            world.agree(problem)
    if world.first:
        _remove_old(folder)
    return final


def load_file(path: Path) -> dict[str, Any]:
    """What `save_file` was given, on the CPU. Runs no code from the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def newest(folder: Path, load: Callable[[Path], Any]) -> tuple[Path, Any] | None:
    """The newest checkpoint that can be read, and what `load` made of it; None where there is none.

    Only a disk that lost what it had confirmed makes the newest unreadable; the one before it then serves.

    Raises:
        UserError: `load` says that the checkpoint does not go with the settings, or none of them can be read: `load`
            may have stopped half way, and what it left is no start for a run.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            return path, load(path)
        except UserError:  # it can be read, and was written for another kind of run: not to be trained over
            raise
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            _logger.warning("the checkpoint '%s' cannot be read and is passed over: %s", path, reason)
    if found:
        raise CheckpointError(f"none of the checkpoints in '{folder}' can be read; resume=false begins the run anew")
    return None


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(f"{_PARTIAL}*") if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    kept = checkpoints(folder)
    good = f"the last good one is '{kept[0]}'" if kept else "there is none before it"
    return CheckpointWriteError(
        f"the checkpoint of step {step} could not be written ({str(error).splitlines()[0]}); {good}. Make room and run "
        f"the same command again to go on from there"
    )


def _remove_old(folder: Path) -> None:
    for path in checkpoints(folder)[KEEP:]:
        try:
            if path.is_dir():
                # the name goes first: a half removed folder must not look like a checkpoint
                gone = path.with_name(f"{_PARTIAL}{path.name}")
                os.replace(path, gone)
                shutil.rmtree(gone)
            else:
                path.unlink()
        except OSError as error:  # the new one is there, and that is what counts
            _logger.warning("the old checkpoint '%s' cannot be removed: %s", path, error)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
