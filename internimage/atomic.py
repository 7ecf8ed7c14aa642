# SPDX-License-Identifier: MIT
"""Atomic files and folders: complete or absent, even if the writer is killed at any point.

A process can be killed between any two system calls. The protocol, for all writers:

1. A partial file has a temporary name from `beside`, on the same disk, and is held by a lock from `locks` that the
   system releases with its process. It gets its final name by a rename, after its bytes have reached the disk.
2. Files that belong together are replaced by `exchange`, which first writes a journal of what it is about to do.
3. `recover` runs before anything is written to a folder: it completes an interrupted exchange, and removes partial
   files that no process holds. It is safe beside running writers, and may be killed itself.

Readers ignore these names. On a file system without locks a dead writer cannot be told from a running one: partial
files are kept there, unless the folder is known to belong to this writer.
"""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from . import locks
from .errors import is_write_protected

_logger = logging.getLogger(__name__)

PARTIAL = ".partial-"  # prefix of partial files and folders, which readers ignore
JOURNAL = ".internimage-replacing"  # exists while files are exchanged

_PARTIAL_NAME = re.compile(re.escape(PARTIAL) + r"(.+-)?[0-9a-f]{8}")


@contextmanager
def replacing(target: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write to that gets its name, replacing a regular file of that name, once it is complete.

    Args:
        target: The path; its folder is created.
        mode: Of the existing file, to be kept; None if there is none.

    Raises:
        OSError: The disk is full, for example; an existing file is unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target.parent)
    stack = ExitStack()
    try:
        file, half = stack.enter_context(_partial_file(target))
    except OSError as error:
        if mode is None or not is_write_protected(error):
            raise
        with target.open("wb") as file:  # the folder is read-only, the file is not
            yield file
        return
    try:
        with stack:
            if mode is not None:
                os.chmod(half, stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":  # while the lock is held
                _rename(half, target)
        if os.name != "posix":  # Windows cannot rename an open file
            _rename(half, target)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


@contextmanager
def _partial_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    while True:
        half = beside(target)
        with half.open("xb") as file, locks.hold_file(file.fileno(), half) as ours:
            if ours:  # else another process removed it before the lock was taken
                yield file, half
                return


def _rename(half: Path, target: Path) -> None:
    try:
        os.replace(half, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(half, target)  # a bind mount of a single file, as in containers
        half.unlink()


def beside(path: Path) -> Path:
    """A unique temporary name in the same folder, which readers ignore."""
    return path.with_name(f"{PARTIAL}{path.name[:40]}-{secrets.token_hex(4)}")


def is_partial(name: str) -> bool:
    """Whether a name is one of `beside` or `partial_folder`; only a killed process leaves such a file."""
    return _PARTIAL_NAME.fullmatch(name) is not None


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder in another, to write files to before they get their names; removed at the end.

    Its lock is a file in it, so its content is passed on in a subfolder.
    """
    recover(parent)
    with ExitStack() as stack:
        while True:
            folder = parent / f"{PARTIAL}{secrets.token_hex(4)}"
            folder.mkdir()
            try:
                stack.enter_context(locks.hold(folder, warn=False))
                break
            except FileNotFoundError:  # another process removed it before the lock was taken
                continue
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        try:
            yield folder
        finally:
            _quietly(_remove_content, folder)
            stack.close()
            _quietly(os.rmdir, folder)


def _quietly(remove: Callable[[Path], None], path: Path) -> None:
    try:
        remove(path)
    except OSError as error:  # not ours, or gone already
        _logger.debug("'%s' stays: %s", path, error)


def sync_folder(folder: Path) -> None:
    """Flush the renames in a folder to the disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- after a kill


def is_leftover(name: str) -> bool:
    """Whether a file is no content of its folder, but something that a killed process may have left."""
    return name == locks.LOCK_FILE or is_partial(name)


def recover(folder: Path, ours: bool = False) -> None:
    """Clean up what killed processes left in a folder, by the protocol at the top of this file; never fails.

    Args:
        folder: Where something is about to be written. Need not exist.
        ours: This process holds it by `locks.hold`, and only holders create partial files in it: also remove those
            whose writer cannot be determined.
    """
    try:
        names = os.listdir(folder)
    except OSError:  # the write that follows reports it
        return
    if JOURNAL in names and not _end_exchange(folder, ours):
        return
    for name in names:
        if is_leftover(name):
            _quietly(partial(_remove_abandoned, ours=ours), folder / name)


def _remove_abandoned(path: Path, ours: bool) -> None:
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        with locks.taken_over(path) as dead:
            if dead or (dead is None and ours):
                path.unlink()
        return
    if not stat.S_ISDIR(mode) or path.name == locks.LOCK_FILE:
        return
    try:
        with locks.taken_over(path / locks.LOCK_FILE) as dead:
            if not dead and (dead is not None or not ours):
                return
            _remove_content(path)
            (path / locks.LOCK_FILE).unlink()  # last: without it nothing shows that the folder is ours
    except FileNotFoundError:  # not locked yet, not any more, or written by an older version
        if ours:
            _remove_content(path)
    path.rmdir()


def _remove_content(folder: Path) -> None:
    """Empty a partial folder, except for its lock."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != locks.LOCK_FILE:
            path.unlink(missing_ok=True)


# ---- files that belong together


@contextmanager
def replacing_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write files to that are moved to another folder, in this order, once all are complete.

    A kill in between leaves the first ones moved: put last what readers look for.

    Args:
        folder: Where they go; exists.
        names: Of the files.

    Raises:
        OSError: The disk is full, for example; existing files are unchanged, unless a rename failed.
    """
    with partial_folder(folder) as partial:
        yield partial
        for name in names:
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
        for name in names:
            os.replace(partial / name, folder / name)
        sync_folder(folder)


def exchange(folder: Path, staged: Path, old: list[str], new: list[str], **notes: Any) -> None:
    """Replace old files by new ones: all of them, or after an error none. `recover` completes it after a kill.

    Args:
        folder: Held by `locks.hold`.
        staged: The folder with the new files, flushed to disk, in a `partial_folder` of `folder`.
        old: Names of the files to remove, in this order; they exist.
        new: Names of the files to add then, in this order.
        notes: Kept in the journal meanwhile, see `noted`.

    Raises:
        OSError: A file cannot be moved; all files are back in place.
    """
    with partial_folder(folder) as away:
        names = {"staged": staged.relative_to(folder).as_posix(), "away": away.name, "old": old, "new": new}
        before = (folder / JOURNAL).read_text(encoding="utf-8") if (folder / JOURNAL).exists() else None
        moves = _moves(folder, names)
        try:
            _write_journal(folder, json.dumps(names | notes))
            sync_folder(folder)
            for source, target in moves:
                os.replace(source, target)
            sync_folder(folder)
        except BaseException:
            for source, target in reversed(moves):
                if target.exists() and not source.exists():
                    os.replace(target, source)
            if before is None:
                (folder / JOURNAL).unlink(missing_ok=True)
            else:  # of an interrupted exchange: nothing else shows that the folder is ours
                _write_journal(folder, before)
            raise
        (folder / JOURNAL).unlink()


def noted(folder: Path) -> dict[str, Any] | None:
    """The journal of an exchange in progress or interrupted; None without one, or if it is not ours."""
    try:
        found = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write_journal(folder: Path, text: str) -> None:
    with replacing(folder / JOURNAL) as file:
        file.write(text.encode())


def _moves(folder: Path, names: dict[str, Any]) -> list[tuple[Path, Path]]:
    staged, away = folder / names["staged"], folder / names["away"]
    return [(folder / name, away / name) for name in names["old"]] + [
        (staged / name, folder / name) for name in names["new"]
    ]


def _end_exchange(folder: Path, ours: bool) -> bool:
    """Complete an exchange that was interrupted; returns whether none is in progress any more."""
    try:
        with nullcontext() if ours else locks.hold(folder, warn=False):
            names = noted(folder)
            if names is None or not _is_exchange(folder, names):  # older versions wrote less, and moved nothing back
                return True
            for source, target in _moves(folder, names):
                # if an old file is away already, what has its name is a new one
                if source.exists() and not (target.exists() and target.parent != folder):
                    os.replace(source, target)
            sync_folder(folder)
            (folder / JOURNAL).unlink()
            return True
    except OSError as error:  # its process is running, or the folder is read-only
        _logger.debug("the exchange in '%s' is left as it is: %s", folder, error)
        return False


def _is_exchange(folder: Path, names: dict[str, Any]) -> bool:
    """Whether a journal moves files within the folder only, as those of `exchange` do."""
    staged, away, old, new = (names.get(key) for key in ("staged", "away", "old", "new"))
    if not (isinstance(staged, str) and isinstance(away, str) and isinstance(old, list) and isinstance(new, list)):
        return False
    parts = staged.split("/")
    for name in (*parts, away, *old, *new):
        if not isinstance(name, str) or name in ("", ".", "..", JOURNAL) or set(name) & set("/\\\0"):
            return False
    inner = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return (
        is_partial(parts[0])
        and is_partial(away)
        and all(path.is_dir() and not path.is_symlink() for path in (folder / away, *inner))
    )
