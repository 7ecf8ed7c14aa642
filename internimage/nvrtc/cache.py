# SPDX-License-Identifier: MIT
"""Compiled kernels on disk, shared by processes: an entry is there whole or not at all, and is checked when it is read.

An entry is a line of JSON with its key, its name, and the checksum of the image that follows. Beside it is a lock file
while a process compiles it. Deleting entries, locks or the folder is safe at any time.
"""

import hashlib
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import locks
from ..atomic import replacing

_logger = logging.getLogger(__name__)

VARIABLE = "INTERNIMAGE_CACHE"
_LARGEST = 1 << 26  # bytes; an image has some 50000
_LONGEST = 30.0  # seconds that a process waits for another one, which takes up to 2; it may be suspended
_complained: set[str] = set()  # folders that cannot be written to


def folder() -> Path | None:
    """Where entries are: `cuda` in INTERNIMAGE_CACHE, or in the user's cache; None if the user has no home."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given) / "cuda"
    system = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    try:
        return (Path(system) if system and os.path.isabs(system) else Path.home() / ".cache") / "internimage" / "cuda"
    except RuntimeError:
        return None


def read(key: dict[str, Any]) -> tuple[bytes, str] | None:
    """The image and name of a key; None if there is no entry, or it is damaged or of another key."""
    path = _path(key)
    if path is None:
        return None
    try:
        with os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return None
            head, _, image = f.read().partition(b"\n")
    except OSError:
        return None
    try:
        facts = json.loads(head)
        name = facts["name"]
        right = facts["key"] == key and facts["sha256"] == hashlib.sha256(image).hexdigest() and isinstance(name, str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (image, name) if right and image else None


@contextmanager
def turn(key: dict[str, Any]) -> Iterator[None]:
    """Wait for the turn to compile a kernel, so that processes that start together compile it once.

    Does not wait in a folder that cannot be written to or has no locks, nor for a process that has died.
    """
    path = _path(key)
    with ExitStack() as stack:
        if path is not None:
            lock = path.with_suffix(".lock")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locks.turn(lock, _LONGEST))
                stack.callback(_remove, lock)  # while it is held
            except OSError as error:
                _logger.debug("not waiting for other processes: %s", error)
        yield


def write(key: dict[str, Any], image: bytes, name: str) -> bool:
    """Keep an image; returns whether it is kept. Warns once, and never fails, if that is impossible."""
    path = _path(key)
    if path is None:
        _complain("", "the user has no home folder")
        return False
    facts = {"key": key, "name": name, "sha256": hashlib.sha256(image).hexdigest()}
    try:
        with replacing(path) as file:
            file.write(json.dumps(facts).encode() + b"\n" + image)
    except OSError as error:
        _complain(str(path.parent), error.strerror or str(error))
        return False
    return True


def entries() -> int:
    """How many there are."""
    where = folder()
    try:
        return 0 if where is None else sum(path.suffix == ".kernel" for path in where.iterdir())
    except OSError:
        return 0


def _path(key: dict[str, Any]) -> Path | None:
    where = folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    readable = re.sub(r"\W+", "-", f"{key['kernel']} {key['target']}")
    return None if where is None else where / f"{readable}-{digest}.kernel"


def _remove(lock: Path) -> None:
    with suppress(OSError):  # Windows does not remove open files; an empty one stays
        lock.unlink()


def _complain(where: str, problem: str) -> None:
    if where in _complained:
        return
    _complained.add(where)
    place = f"in '{where}' " if where else ""
    _logger.warning(
        "compiled CUDA kernels cannot be kept %s(%s): each process compiles them again. %s names another folder",
        place,
        problem,
        VARIABLE,
    )
