# SPDX-License-Identifier: MIT
"""One writer for a folder or a file: locks that end with their process, and so identify what a killed one left."""

import datetime
import errno
import logging
import math
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # asked for before each use
    import msvcrt

_logger = logging.getLogger(__name__)

LOCK_FILE = ".internimage.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_FAR = 1 << 30  # on Windows a locked byte cannot be read, so it is one beyond the text

# Folders of `hold` and files of `hold_file`. The system's locks belong to a process: it would grant this one the same
# lock again, and release it as soon as this process closes the file anywhere. So these are not even opened.
_held: set[str] = set()
_held_lock = threading.Lock()


class LockedError(UserError, OSError):
    """Another run is writing to the folder."""


@contextmanager
def hold(folder: Path, warn: bool = True) -> Iterator[None]:
    """Be the only writer to a folder, among all that use `hold`.

    The lock is a POSIX record lock (not flock, which a loader's workers inherit and would keep after a kill), so the
    system releases it however the process ends.

    Args:
        folder: The folder; exists.
        warn: Warn if the file system has no locks, so that another run could write there too.

    Raises:
        LockedError: Another run holds it; the message says which.
        OSError: The lock file cannot be written.
    """
    with _noted(folder) as free:
        if not free:
            raise LockedError(_refusal(folder, f"this process ({os.getpid()})"))
        file = _acquire(folder, warn)
        try:
            yield
        finally:
            if file is not None:
                _release(folder / LOCK_FILE, file)


@contextmanager
def hold_file(file: int, path: Path) -> Iterator[bool]:
    """Hold an open file while it is written to; closing it anywhere releases the lock.

    Yields:
        Whether the path is still this file: another process may have removed it as one that a killed process left.
    """
    with _noted(path):
        yield _try_lock(file) is not False and _is_at(file, path)


@contextmanager
def taken_over(path: Path) -> Iterator[bool | None]:
    """Hold a file that another process created, unless that process is still running.

    Yields:
        Whether the file's writer is dead; None if that cannot be known, as the file system has no locks.

    Raises:
        OSError: The file does not exist, or is read-only.
    """
    with _looking(path.parent if path.name == LOCK_FILE else path) as free:
        if not free:
            yield False
            return
        file = _open(path, os.O_RDWR)
        try:
            locked = _try_lock(file)
            yield locked and _is_at(file, path)
        finally:
            os.close(file)


@contextmanager
def turn(path: Path, most_seconds: float = math.inf) -> Iterator[BinaryIO]:
    """Wait for the turn to replace or remove a file, among all processes that use `turn`; creates it if there is none.

    Args:
        path: The file.
        most_seconds: How long to wait.

    Yields:
        The file, for reading: opening it once more, and closing that, would release the lock.

    Raises:
        OSError: The file cannot be opened, or the wait took too long (TimeoutError).
    """
    end = time.monotonic() + most_seconds
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
            while _try_lock(file.fileno()) is False:
                if time.monotonic() > end:
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds it", str(path))
                time.sleep(0.01)
            if _is_at(file.fileno(), path):  # else it was replaced meanwhile
                yield file
                return


def check_free(folder: Path) -> None:
    """Raise LockedError if another run holds the folder; creates nothing."""
    with _looking(folder) as free:
        if not free:
            raise LockedError(_refusal(folder, f"this process ({os.getpid()})"))
        try:
            file = _open(folder / LOCK_FILE, os.O_RDWR)
        except OSError:  # there is none, or `hold` reports what is wrong
            return
        try:
            if _try_lock(file) is False:
                raise LockedError(_refusal(folder, _owner(file)))
        finally:
            os.close(file)


@contextmanager
def _noted(path: Path) -> Iterator[bool]:
    """Record what this process holds; yields whether it was free, as far as this process is concerned."""
    key = os.path.realpath(path)
    with _held_lock:
        free = key not in _held
        _held.add(key)
    try:
        yield free
    finally:
        if free:
            with _held_lock:
                _held.discard(key)


@contextmanager
def _looking(path: Path) -> Iterator[bool]:
    """Yield whether this process does not hold it; meanwhile no other thread can begin to hold it."""
    with _held_lock:
        yield os.path.realpath(path) not in _held


def _open(path: Path, flags: int) -> int:
    """Open a regular file: a link could lead to someone's file, and opening a pipe would block."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _acquire(folder: Path, warn: bool) -> int | None:
    """The locked file's descriptor; None if the file system has no locks."""
    path, owner = folder / LOCK_FILE, ""
    for attempt in range(20):
        if attempt:  # it may be a `check_free`, or a killed process that has not exited yet
            time.sleep(0.05)
        file = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            locked = _try_lock(file)
            # its last holder may have removed it meanwhile: the next process would lock another file of this name
            if locked and _is_at(file, path):
                since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
                return file
            owner = _owner(file)
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if locked is None:
            if warn:
                _logger.warning(
                    "the file system of '%s' has no locks: nothing keeps a second run from writing there", folder
                )
            path.unlink(missing_ok=True)
            return None
    raise LockedError(_refusal(folder, owner))


def _release(path: Path, file: int) -> None:
    try:
        if fcntl is not None:  # removed while it is held, so it cannot be another's file
            path.unlink(missing_ok=True)
    except OSError:  # without a lock the file has no meaning
        pass
    finally:
        os.close(file)
    if fcntl is None:  # Windows cannot remove an open file, so not one that another process has locked since
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def _try_lock(file: int) -> bool | None:
    """Whether the lock was free; None if the file system has none."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, _FAR, os.SEEK_SET)
            try:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, 1000).decode(errors="replace").strip()


def _refusal(folder: Path, owner: str) -> str:
    owner = next(iter(owner.splitlines()), "") or "a process that has not written its name yet"
    return f"another run is writing to '{folder}': {owner}. Wait for its end, or name another folder"
