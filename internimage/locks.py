# SPDX-License-Identifier: MIT
"""One writer to a folder or a file: locks that die with their process, and so tell what a killed one left."""

import datetime
import errno
import logging
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
_FAR = 1 << 30  # on Windows a locked byte cannot be read, so it is one behind the text

# Folders of `hold` and files of `hold_file`. The system's locks are of a process: it would give this one the same lock
# again, and take it away as soon as this process closes the file anywhere. So these are not even opened.
_held: set[str] = set()
_held_lock = threading.Lock()


class LockedError(UserError, OSError):
    """Another run writes to the folder."""


@contextmanager
def hold(folder: Path, warn: bool = True) -> Iterator[None]:
    """Be the only one that writes to a folder, which is there. Elsewhere than in `hold` the folder is free to all.

    The lock is a POSIX record lock (not flock, which a loader's workers inherit, and would keep after a kill), so the
    system releases it however the process ends.

    Args:
        folder: The folder.
        warn: Where the file system has no locks; another run could write there too.

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
    """Hold an open file while it is written to, under the name that it has; closing it anywhere ends that.

    Yields:
        Whether the name is still this file's: another process may have taken it for one that a killed process left.
    """
    with _noted(path):
        yield _try_lock(file) is not False and _is_at(file, path)


@contextmanager
def taken_over(path: Path) -> Iterator[bool | None]:
    """Hold a file that another process has made, unless that one lives.

    Yields:
        Whether the file's writer is dead. None where that cannot be known, since the file system has no locks.

    Raises:
        OSError: The file is not there, or may not be written to.
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
def turn(path: Path) -> Iterator[BinaryIO]:
    """Wait for the turn to replace a file, which is made if there is none. Elsewhere than in `turn` it is free to all.

    Yields:
        The file, to read: opened once more, it would be free as soon as that is closed.

    Raises:
        OSError: The file cannot be opened.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
            while _try_lock(file.fileno()) is False:
                time.sleep(0.01)
            if _is_at(file.fileno(), path):  # else another one was put in its place meanwhile
                yield file
                return


def check_free(folder: Path) -> None:
    """A look at the lock, which makes nothing: LockedError where another run holds it."""
    with _looking(folder) as free:
        if not free:
            raise LockedError(_refusal(folder, f"this process ({os.getpid()})"))
        try:
            file = _open(folder / LOCK_FILE, os.O_RDWR)
        except OSError:  # there is none, or `hold` will say what is wrong
            return
        try:
            if _try_lock(file) is False:
                raise LockedError(_refusal(folder, _owner(file)))
        finally:
            os.close(file)


@contextmanager
def _noted(path: Path) -> Iterator[bool]:
    """Note what this process holds; yields whether it was free, as far as this process goes."""
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
    """Yields whether it is free, as far as this process goes, and keeps it so: no other thread begins to hold it."""
    with _held_lock:
        yield os.path.realpath(path) not in _held


def _open(path: Path, flags: int) -> int:
    """A link of that name leads to somebody's file, which is not to be emptied; a pipe would be waited for."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _acquire(folder: Path, warn: bool) -> int | None:
    """The locked file's descriptor; None where the file system has no locks."""
    path, owner = folder / LOCK_FILE, ""
    for attempt in range(20):
        if attempt:  # it may be a look of `check_free`, or a killed process that is not gone yet
            time.sleep(0.05)
        file = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            locked = _try_lock(file)
            # whoever held it may have removed it meanwhile: the next one would lock another file of this name
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
        if fcntl is not None:  # removed while it is held: no other's file can stand there
            path.unlink(missing_ok=True)
    except OSError:  # it says nothing once it is not locked
        pass
    finally:
        os.close(file)
    if fcntl is None:  # Windows removes no open file, thus none that another process has locked since
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def _try_lock(file: int) -> bool | None:
    """Whether the lock was free; None where the file system has none."""
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
    owner = next(iter(owner.splitlines()), "") or "a process that has not said its name yet"
    return f"another run is writing to '{folder}': {owner}. Wait for its end, or name another folder"
