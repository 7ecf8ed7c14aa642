# SPDX-License-Identifier: MIT
"""All writing of files: a file appears complete or not at all, and nobody else's file is replaced.

Files and folders are created by the system's own calls, so that their mode follows the umask; tempfile and safetensors
would create files that only their owner can read.
"""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .atomic import replacing
from .errors import UserError
from .locks import turn

STDOUT = "-"  # as the name of a file


class WriteError(UserError, OSError):
    """A file could not be written; what was there before is unchanged."""


@contextmanager
def archive_errors() -> Iterator[None]:
    """Context for `torch.save`, whose archive writer turns a full disk and Ctrl-C into RuntimeError: raise those."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__
        while cause is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `writing` does."""
    with writing(path) as file:
        file.write(text.encode())


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to. A regular file appears under its name only once it is complete; creates its folder.

    A symbolic link is kept, and its target is replaced. A device, a pipe, `/dev/fd/N` and `-` (standard output) are
    written to directly, since a rename would put a regular file in their place.

    Raises:
        WriteError: The path is a folder, a block device or a socket, or the reader of the pipe has closed it.
        OSError: The disk is full, for example.
    """
    if str(path) == STDOUT:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    descriptor = _descriptor(path)
    target = Path(os.path.realpath(path))
    there = None if descriptor is not None else _mode(path)
    if descriptor is None and (there is None or stat.S_ISREG(there)):
        with replacing(target, there) as file:
            yield file
        return
    _check_kind(path, there)
    try:
        if descriptor is None:
            file = target.open("wb")
        else:  # a duplicate of the descriptor: opened by name, a file would be overwritten from its start
            sys.stdout.flush()
            file = os.fdopen(os.dup(descriptor), "wb")
        with file:
            yield file
    except BrokenPipeError as error:
        if descriptor == 1:  # as with `| head`
            raise
        raise WriteError(f"'{path}' was closed by its reader before everything was written") from error


@contextmanager
def appending(path: str | Path) -> Iterator[BinaryIO]:
    """A file to append lines to, also concurrently: all lines of a caller appear at once, or none.

    It is positioned at its end, on a new line. What is not a regular file is written to as by `writing`.
    """
    mode = _mode(path)
    if str(path) == STDOUT or _descriptor(path) is not None or (mode is not None and not stat.S_ISREG(mode)):
        with writing(path) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK | os.X_OK):  # the folder is read-only, the file is not
        with target.open("ab") as file:
            yield file
        return
    with turn(target) as there:
        content = there.read()
        with replacing(target, os.fstat(there.fileno()).st_mode) as file:
            file.write(content)
            if content and not content.endswith(b"\n"):
                file.write(b"\n")
            yield file


# ---- before hours of work


def check_writable(path: str | Path) -> None:
    """Check that `writing` can write to a path. Opens nothing, which could block on a pipe, and creates nothing.

    Raises:
        UserError: It cannot.
    """
    if str(path) == STDOUT:
        return
    if not str(path):
        raise UserError("a file to write to has no name: got ''")
    descriptor = _descriptor(path)
    if descriptor is not None:
        import fcntl  # available wherever descriptors have names

        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        except OSError as error:
            raise UserError(f"'{path}' cannot be written to: it is not open") from error
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise UserError(f"'{path}' cannot be written to: it is open for reading")
        return
    mode = _mode(path)
    if str(path).endswith("/"):
        mode = stat.S_IFDIR
    _check_kind(path, mode)
    if mode is not None:
        if not os.access(path, os.W_OK):
            raise UserError(f"'{path}' cannot be written to: it is write-protected")
        return
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"'{path}' cannot be written to: '{folder}' is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"'{path}' cannot be written to: the folder '{folder}' is write-protected")


def is_stdout(path: str | Path | None) -> bool:
    """Whether a path is standard output, so that nothing else should be printed there."""
    return path is not None and (str(path) == STDOUT or _descriptor(path) == 1)


def _mode(path: str | Path) -> int | None:
    """File type and permissions of what a path leads to; None if there is nothing yet."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:  # a loop of links, a file among the folders
        raise WriteError(f"'{path}' cannot be written to: {error.strerror}") from error


def _check_kind(path: str | Path, mode: int | None) -> None:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFBLK: "block device", stat.S_IFSOCK: "socket"}
    kind = None if mode is None else kinds.get(stat.S_IFMT(mode))
    if kind is not None:
        raise WriteError(f"'{path}' is a {kind}; the name of a file is needed")


def _descriptor(path: str | Path) -> int | None:
    """N if a path names this process's descriptor N, such as /dev/stdout or the /dev/fd/63 of `>(...)`; else None.

    The open file need not have a name, and if it has one, others may write through the same descriptor.
    """
    path = os.fspath(path)
    for _ in range(40):  # links; the kernel's own limit
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        if name.isdecimal() and folder in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None
