# SPDX-License-Identifier: MIT
"""One writer to a folder: a lock that dies with its process."""

import datetime
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_logger = logging.getLogger(__name__)

LOCK_FILE = ".internimage.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_FAR = 1 << 30  # on Windows a locked byte cannot be read, so it is one behind the text

# The system's locks are of a process: it would give this one the same lock again, and take it away as soon as this
# process closes the file anywhere.
_held: set[str] = set()
_held_lock = threading.Lock()


class LockedError(UserError, OSError):
    """Another run writes to the folder."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only one that writes to a folder, which is there. Elsewhere than in `hold` the folder is free to all.

    The lock is a POSIX record lock (not flock, which a loader's workers inherit, and would keep after a kill), so the
    system releases it however the process ends. A file system without locks gets a warning.

    Raises:
        LockedError: Another run holds it; the message says which.
        OSError: The lock file cannot be written.
    """
    key = os.path.realpath(folder)
    with _held_lock:
        if key in _held:
            raise LockedError(_refusal(folder, f"this process ({os.getpid()})"))
        _held.add(key)
    try:
        file = _acquire(folder)
        try:
            yield
        finally:
            if file is not None:
                _release(folder / LOCK_FILE, file)
    finally:
        with _held_lock:
            _held.discard(key)


def check_free(folder: Path) -> None:
    """A look at the lock, which makes nothing: LockedError where another run holds it."""
    if os.path.realpath(folder) in _held:
        raise LockedError(_refusal(folder, f"this process ({os.getpid()})"))
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:  # there is none, or `hold` will say what is wrong
        return
    try:
        if _try_lock(file) is False:
            raise LockedError(_refusal(folder, _owner(file)))
    finally:
        os.close(file)


def _acquire(folder: Path) -> int | None:
    """The locked file's descriptor; None where the file system has no locks."""
    path, owner = folder / LOCK_FILE, ""
    for attempt in range(20):
        if attempt:  # it may be a look of `check_free`, or a killed process that is not gone yet
            time.sleep(0.05)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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
