# SPDX-License-Identifier: MIT
"""Checkpoints of a run: written whole or not at all, the last two kept.

A checkpoint is a file, or with sharded weights a folder with a part from every process. It appears under its name by a
rename, after everything in it has reached the disk: whatever instant a run is killed at, the newest name is whole.
"""

import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UserError
from ..files import PARTIAL, WriteError, save_tensors
from .distributed import World

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})(?:\.pt)?")
_PART = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|state\.pt")  # of a checkpoint that is a folder
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
        save_tensors(partial, state)
        os.replace(partial, final)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        raise _failed(folder, step, error) from error
    except BaseException:
        _clean(folder)
        raise
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


class DamagedError(ValueError):
    """A checkpoint that is not what was written; the message says why, to stand in a sentence about it."""


def load_file(path: Path) -> dict[str, Any]:
    """What `save_file` was given, on the CPU. Runs no code from the file.

    Raises:
        DamagedError: It is no such file, or not all of it. torch's own reasons are for those who make such files, and
            one of them advises to run the code in it.
        OSError: It cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd bytes, which are an error here
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # there is no end to how reading damaged bytes can fail
        _logger.debug("reading '%s'", path, exc_info=error)
        raise DamagedError(
            f"its {path.stat().st_size} bytes are not those of a checkpoint, or not all of them"
        ) from error
    if not isinstance(state, dict):
        raise DamagedError(f"it holds {type(state).__name__} instead of a run's state")
    return state


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
        except (OSError, DamagedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            _logger.warning("the checkpoint '%s' cannot be read and is passed over: %s", path, reason)
    if found:
        raise CheckpointError(f"none of the checkpoints in '{folder}' can be read; resume=false begins the run anew")
    return None


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
        _remove_old(folder)


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
    if not path.is_dir():
        path.unlink()
        return
    # the name goes first: a half removed folder must not look like a checkpoint
    others = any(not _PART.fullmatch(file.name) for file in path.iterdir())
    gone = path.with_name(f"{'not-of-' if others else PARTIAL}{path.name}")
    os.replace(path, gone)
    for file in list(gone.iterdir()):
        if _PART.fullmatch(file.name):
            file.unlink()
    remove_if_empty(gone)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
