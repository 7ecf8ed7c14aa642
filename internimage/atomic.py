# SPDX-License-Identifier: MIT
"""Files and folders that are there whole or not at all, whenever their writer is killed.

A process can be killed between any two system calls. One rule mends what it leaves, whoever the writer was:

1. What is half written stands under a name of `beside`, on the same disk, and is held by a lock of `locks` that ends
   with its process. It gets its own name by a rename, after its bytes have reached the disk.
2. Files that go together are exchanged by `exchange`: what it is going to do is written down before it begins.
3. `recover` comes first wherever something is written to a folder: it ends an exchange that was begun, and removes what
   is half written and held by nobody. It is safe beside living writers, and may be killed itself.

Readers look at none of these names. On a file system without locks nobody can tell a dead writer from a living one:
there half written files stay, unless the folder is known to be the writer's own.
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

PARTIAL = ".partial-"  # begins the names of what is half written; no reader looks at these
JOURNAL = ".internimage-replacing"  # is there while files are exchanged

_PARTIAL_NAME = re.compile(re.escape(PARTIAL) + r"(.+-)?[0-9a-f]{8}")


@contextmanager
def replacing(target: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write to that gets its name, and the place of a regular file of that name, once it is whole.

    Args:
        target: Its name; its folder is made.
        mode: Of the file that is there, which the new one gets; None where there is none.

    Raises:
        OSError: The disk is full, or the like; what was there is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target.parent)
    stack = ExitStack()
    try:
        file, half = stack.enter_context(_partial_file(target))
    except OSError as error:
        if mode is None or not is_write_protected(error):
            raise
        with target.open("wb") as file:  # of this folder, this file alone may be written to
            yield file
        return
    try:
        with stack:
            if mode is not None:
                os.chmod(half, stat.S_IMODE(mode))  # what its owner gave it
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":  # while it is held
                _rename(half, target)
        if os.name != "posix":  # Windows renames no open file
            _rename(half, target)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


@contextmanager
def _partial_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    while True:
        half = beside(target)
        with half.open("xb") as file, locks.hold_file(file.fileno(), half) as ours:
            if ours:  # else another process has removed it, before it was held
                yield file, half
                return


def _rename(half: Path, target: Path) -> None:
    try:
        os.replace(half, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(half, target)  # mounted on its own, as a single file of a container is
        half.unlink()


def beside(path: Path) -> Path:
    """A name in the same folder that nobody has and no reader looks for."""
    return path.with_name(f"{PARTIAL}{path.name[:40]}-{secrets.token_hex(4)}")


def is_partial(name: str) -> bool:
    """Whether a name is one of those of `beside` and `partial_folder`, which only a killed process leaves."""
    return _PARTIAL_NAME.fullmatch(name) is not None


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder in another, to write files in before they get their names; is removed at the end.

    Its lock is a file in it: who hands on all that is in it hands on a folder in it.
    """
    recover(parent)
    with ExitStack() as stack:
        while True:
            folder = parent / f"{PARTIAL}{secrets.token_hex(4)}"
            folder.mkdir()
            try:
                stack.enter_context(locks.hold(folder, warn=False))
                break
            except FileNotFoundError:  # another process has removed it, before it was held
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
    except OSError as error:  # somebody else's, gone already
        _logger.debug("'%s' stays: %s", path, error)


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder has reached the disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- after a kill


def is_leftover(name: str) -> bool:
    """Whether a name in a folder says nothing of what is in it: a killed process can leave it there."""
    return name == locks.LOCK_FILE or is_partial(name)


def recover(folder: Path, ours: bool = False) -> None:
    """Mend what killed processes left in a folder, as the rule at the top of this file says; never fails.

    Args:
        folder: Where something is going to be written. Need not be there.
        ours: This process has it by `locks.hold`, and nobody but its holders makes such names in it: remove what does
            not tell its writer, too.
    """
    try:
        names = os.listdir(folder)
    except OSError:  # who writes will say what is wrong
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
            (path / locks.LOCK_FILE).unlink()  # last: without it nothing says that the folder is of ours
    except FileNotFoundError:  # not locked yet, or no longer, or of an older version
        if ours:
            _remove_content(path)
    path.rmdir()


def _remove_content(folder: Path) -> None:
    """Remove what is in a partial folder but its lock."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != locks.LOCK_FILE:
            path.unlink(missing_ok=True)


# ---- files that go together


@contextmanager
def replacing_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write files to that get their names in another folder, in this order, once all are whole.

    After a kill in between, the first of them are there: what readers look for goes last.

    Args:
        folder: Where they go; is there.
        names: Of the files.

    Raises:
        OSError: The disk is full, or the like; what was there is as it was, unless it was renaming that failed.
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
    """Put new files in the place of old ones: all of them, or after an error none. `recover` ends it after a kill.

    Args:
        folder: Is held by `locks.hold`.
        staged: The folder of the new files, on the disk to their end, in a `partial_folder` of `folder`.
        old: Names of the files that go, in this order; all there.
        new: Names of the files that come then, in this order.
        notes: Are kept while it lasts, see `noted`.

    Raises:
        OSError: A file cannot be moved; everything is where it was.
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
            else:  # after a kill: nothing else says that the folder is ours
                _write_journal(folder, before)
            raise
        (folder / JOURNAL).unlink()


def noted(folder: Path) -> dict[str, Any] | None:
    """What `exchange` keeps in a folder while it lasts; None where none was begun, or what is there is not ours."""
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
    """End an exchange that a killed process has begun; returns whether none is under way any longer."""
    try:
        with nullcontext() if ours else locks.hold(folder, warn=False):
            names = noted(folder)
            if names is None or not _is_exchange(folder, names):  # older versions noted less, and moved nothing back
                return True
            for source, target in _moves(folder, names):
                # an old file is away already, or a new one would be taken for it
                if source.exists() and not (target.exists() and target.parent != folder):
                    os.replace(source, target)
            sync_folder(folder)
            (folder / JOURNAL).unlink()
            return True
    except OSError as error:  # its process lives, or the folder may not be written to
        _logger.debug("the exchange in '%s' stays as it is: %s", folder, error)
        return False


def _is_exchange(folder: Path, names: dict[str, Any]) -> bool:
    """Whether it moves files in the folder alone, as all that `exchange` has written does."""
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
